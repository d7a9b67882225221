"""Answers which checkpoint to resume from, and decides which ones may be deleted.

The commit records are the truth; there is no "latest" pointer that could point to nothing. What
happens to a checkpoint after its commit is told by verdicts, records that are only ever added.
"""

from collections.abc import Callable

import msgspec

from storage.blob import BlobStore
from storage.commit import check_shard, latest_commit
from storage.errors import (
    BlobExistsError,
    BlobNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from storage.manifest import (
    COMMITS,
    GENERATIONS,
    VERDICTS,
    Manifest,
    check_identity,
    commit_key,
    decode_manifest,
    describe,
    generation_prefix,
    parse_commit_key,
    parse_generation_key,
    parse_verdict_key,
    verdict_key,
)

QUARANTINED = "quarantined"
DELETING = "deleting"

_VERDICT_ATTEMPTS = 16


class CommitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the catalog: a manifest, or else what is wrong with its record."""

    step: int
    epoch: int
    manifest: Manifest | None
    fault: str = ""


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that was passed over, and why, in words for an operator."""

    step: int
    epoch: int
    reason: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided about a checkpoint after its commit."""

    step: int
    epoch: int
    kind: str
    reason: str


class Catalog:
    """The checkpoints of one run, newest first; holds nothing, asks the store every time."""

    def __init__(self, store: BlobStore) -> None:
        self.store = store

    def commits(self) -> list[CommitRecord]:
        """Return every commit, by step and then epoch, newest first.

        A record that cannot be read is reported with its fault. If two epochs committed one step,
        the newer epoch's stands and the older one is reported as superseded.

        Raises:
            StorageUnavailableError: if the store does not answer; that says nothing about any
                checkpoint, and must not be taken for one that is bad.
        """
        parsed = [parse_commit_key(key) for key in self.store.keys(COMMITS)]
        records: list[CommitRecord] = []
        for step, epoch in sorted((found for found in parsed if found), reverse=True):
            if records and records[-1].step == step:
                fault = f"superseded by epoch {records[-1].epoch}"
                records.append(CommitRecord(step=step, epoch=epoch, manifest=None, fault=fault))
            else:
                records.append(self._read(step, epoch))
        return records

    def newest_verified(
        self,
        *,
        before_step: int | None = None,
        run_id: str | None = None,
        model: str | None = None,
    ) -> tuple[Manifest | None, list[Rejection]]:
        """Return the newest checkpoint whose every byte is what was staged.

        Reads whole checkpoints, one block of 16 MiB at a time.

        Args:
            before_step: consider only earlier steps; for a corruption with a known onset.
            run_id: accept only this run's; None accepts any.
            model: accept only this fingerprint; None accepts any.

        Returns:
            The manifest, or None if none is left, and why each newer one was passed over. None
            with rejections is not an empty store: stop and let an operator look.

        Raises:
            StorageUnavailableError: if the store does not answer. Falling back to an older
                checkpoint, or to none, because of a slow network would throw work away.
        """
        rejections: list[Rejection] = []
        barred = self.barred()
        for record in self.commits():
            if before_step is not None and record.step >= before_step:
                continue
            verdict_at = barred.get((record.step, record.epoch))
            reason = (
                self._reason(verdict_at)
                if verdict_at
                else self._why_not(record, run_id=run_id, model=model)
            )
            if not reason:
                return record.manifest, rejections
            rejections.append(Rejection(step=record.step, epoch=record.epoch, reason=reason))
        return None, rejections

    def quarantine(self, step: int, epoch: int, reason: str) -> str:
        """Bar a checkpoint from being resumed, for good, and return the verdict's key.

        Its bytes stay until `retain` reaches it, for whoever looks into the incident. When a run
        goes back behind a corruption, quarantine every checkpoint from its onset on: the newest
        step wins otherwise, whatever epoch wrote it.
        """
        return self._judge(step, epoch, QUARANTINED, reason)

    def retain(
        self,
        keep_last: int,
        *,
        verified: Manifest | None = None,
        leased: Callable[[int, int], bool] = lambda _step, _epoch: False,
    ) -> list[tuple[int, int]]:
        """Delete all but the newest checkpoints, and the shards that can never be committed.

        Never deleted: the `keep_last` newest that could be resumed from, the newest verified one,
        the latest of the newest epoch, whatever has a later step than any of these, and what is
        leased. Safe to repeat after a crash at any point.

        Args:
            keep_last: how many checkpoints to keep, at least 1.
            verified: what `newest_verified` returned lately. Without it, it is asked now, which
                reads a whole checkpoint.
            leased: whether somebody reads, or is about to read, the checkpoint of this step and
                epoch; asked of each when its deletion is about to begin, and not after that.

        Returns:
            (step, epoch) of the checkpoints deleted, oldest first.

        Raises:
            ValueError: if `keep_last` is below 1.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, must be at least 1")
        barred = self.barred()
        anchor = verified
        if anchor is None or (anchor.step, anchor.epoch) in barred:
            anchor, _ = self.newest_verified()
        if anchor is None:
            # With nothing to fall back to, whatever is there is evidence or the last hope.
            return []
        records = self.commits()
        sound = [(record.step, record.epoch) for record in records if record.manifest]
        sound = [where for where in sound if where not in barred]
        # The running epoch may have gone back to an early step. Its latest commit is where the
        # run is now, however far an earlier epoch had come.
        current = sorted(sound, key=lambda where: where[::-1])[-1:]
        oldest_kept = min([*sound[:keep_last], *current, (anchor.step, anchor.epoch)])
        older = sorted((r.step, r.epoch) for r in records if (r.step, r.epoch) < oldest_kept)
        victims: list[tuple[int, int]] = []
        for step, epoch in older:
            if leased(step, epoch):
                continue
            victims.append((step, epoch))
            # The verdict first: from here on nobody starts to read it. Then the commit, so that no
            # commit is visible without its shards.
            if (step, epoch) not in barred:
                self._judge(step, epoch, DELETING, f"older than the {keep_last} to keep")
            self.store.delete(commit_key(step, epoch))
            self._delete_shards(step, epoch)
        self._collect_orphans()
        return victims

    def _read(self, step: int, epoch: int) -> CommitRecord:
        manifest, fault = None, ""
        try:
            manifest = decode_manifest(self.store.get(commit_key(step, epoch)))
            if (manifest.step, manifest.epoch) != (step, epoch):
                fault = f"record is of another {describe(manifest)}"
                manifest = None
        except StorageError as error:
            if error.retryable:
                raise
            fault = str(error)
        return CommitRecord(step=step, epoch=epoch, manifest=manifest, fault=fault)

    def _why_not(self, record: CommitRecord, *, run_id: str | None, model: str | None) -> str:
        """Return why a checkpoint cannot be resumed from; empty if it can."""
        if record.manifest is None:
            return record.fault
        try:
            check_identity(record.manifest, run_id=run_id, model=model)
            for shard in range(record.manifest.shards):
                check_shard(self.store, record.manifest, shard)
        except StorageError as error:
            if error.retryable:
                raise
            return str(error)
        return ""

    def barred(self) -> dict[tuple[int, int], str]:
        """Return by (step, epoch) the key of the newest verdict; each kind bars a checkpoint.

        Only keys are looked at, so that a damaged verdict still counts, and a long history of
        deletions costs one listing.
        """
        keys = self.store.keys(VERDICTS)
        parsed = ((key, parse_verdict_key(key)) for key in keys)
        return {(found[0], found[1]): key for key, found in parsed if found}

    def _reason(self, key: str) -> str:
        try:
            verdict = msgspec.json.decode(self.store.get(key), type=Verdict)
        except (msgspec.MsgspecError, UnicodeDecodeError, BlobNotFoundError):
            return f"barred, and the verdict is unreadable: {key}"
        return f"{verdict.kind}: {verdict.reason}"

    def _judge(self, step: int, epoch: int, kind: str, reason: str) -> str:
        verdict = Verdict(step=step, epoch=epoch, kind=kind, reason=reason)
        data = msgspec.json.encode(verdict)
        taken = len(self.store.keys(f"{VERDICTS}{step}-{epoch}/"))
        for number in range(taken, taken + _VERDICT_ATTEMPTS):
            key = verdict_key(step, epoch, number, kind)
            try:
                self.store.put(key, data)
            except BlobExistsError:
                continue
            return key
        raise StorageUnavailableError(
            f"no free number for a verdict in {_VERDICT_ATTEMPTS} attempts: step {step}"
        )

    def _delete_shards(self, step: int, epoch: int) -> None:
        for key in self.store.keys(generation_prefix(step, epoch)):
            self.store.delete(key)

    def _collect_orphans(self) -> None:
        """Delete shards that have no commit and that `commit` would refuse.

        The latest commit is asked for before the listing of commits: a generation that was
        committed before the latest one is then surely in that listing.
        """
        latest = latest_commit(self.store)
        committed = {parse_commit_key(key) for key in self.store.keys(COMMITS)}
        stored = {parse_generation_key(key) for key in self.store.keys(GENERATIONS)}
        for where in sorted(found for found in stored - committed if found):
            step, epoch = where
            if latest is not None and (epoch, step) < latest:
                self._delete_shards(step, epoch)
