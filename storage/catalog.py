"""Answers which checkpoint to resume from, and decides which ones may be deleted.

The commit records are the truth; there is no "latest" pointer that could point to nothing. What
happens to a checkpoint after its commit is told by verdicts, records that are only ever added.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial

import msgspec

from storage import parallel, verdicts
from storage.blob import BlobStore
from storage.commit import check_shard, completed, latest_commit
from storage.errors import (
    BlobNotFoundError,
    ForeignCheckpointError,
    StorageError,
    StorageRefusedError,
    UnsupportedVersionError,
    is_of_content,
)
from storage.leases import Leases
from storage.manifest import (
    COMMITS,
    GENERATIONS,
    Manifest,
    check_identity,
    commit_key,
    describe,
    generation_prefix,
    parse_commit_key,
    parse_generation_key,
    read_manifest,
)
from storage.retention import LATER, Candidate, Ladder, kept
from storage.verdicts import DELETING, QUARANTINED, RELEASED, Standing, Trust, Where

SHARDS_AT_ONCE = 4
"""Of which the bodies are read at a time, a few blocks of 16 MiB of each."""


class CommitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the catalog: a manifest, or else what is wrong with its record.

    Nothing is wrong with one that is superseded; a newer epoch's stands for its step. Nor with one
    that is unsupported: another version of the program can read it.
    """

    step: int
    epoch: int
    manifest: Manifest | None
    fault: str = ""
    superseded: bool = False
    unsupported: bool = False


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that was passed over, and why, in words for an operator."""

    step: int
    epoch: int
    reason: str
    sound: bool = False
    """Whether no more is wrong with it than that it is trusted less far than was asked for."""


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be kept and what is to go.

    Attributes:
        kept: by (step, epoch), why, in words for an operator.
        victims: (step, epoch) of the checkpoints to delete, oldest first.
        going: whose deletion was begun before, and is to be done again from there.
    """

    kept: dict[Where, str]
    victims: tuple[Where, ...]
    going: frozenset[Where]


class Catalog:
    """The checkpoints of one run, newest first; holds nothing, asks the store every time."""

    def __init__(self, store: BlobStore) -> None:
        self.store = store

    def commits(self) -> list[CommitRecord]:
        """Return every commit, by step and then epoch, newest first.

        A record that cannot be read is reported with its fault. If two epochs committed one step,
        the newer epoch's stands and the older one is reported as superseded.

        Raises:
            StorageUnavailableError, StorageRefusedError: if the store does not answer, or lets us
                not read a record; that says nothing about any checkpoint, and must not be taken for
                one that is bad.
        """
        return parallel.each(self._record, self._entries())

    def known(self) -> list[Where]:
        """Return (step, epoch) of every commit, readable or not, newest first. One listing."""
        return [where for where, _ in self._entries()]

    def newest_verified(
        self,
        *,
        before_step: int | None = None,
        at_least: Trust = Trust.WRITTEN,
        run_id: str | None = None,
        model: str | None = None,
    ) -> tuple[Manifest | None, list[Rejection]]:
        """Return the newest checkpoint whose every byte is what was staged.

        Reads whole checkpoints, one block of 16 MiB at a time.

        Args:
            before_step: consider only earlier steps; for a corruption with a known onset.
            at_least: of what is trusted less far by verdicts nothing is read.
            run_id: accept only this run's; None accepts any.
            model: accept only this fingerprint; None accepts any.

        Returns:
            The manifest, or None if none is left, and why each newer one was passed over. None
            with rejections is not an empty store: stop and let an operator look.

        Raises:
            StorageUnavailableError, StorageRefusedError: if the store does not answer, or lets us
                not read what is newer. Falling back to an older checkpoint, or to none, because of
                a slow network or missing permissions would throw work away.
        """

        def why_not(record: CommitRecord) -> str:
            return self._why_not(record, run_id=run_id, model=model)

        return self._first(why_not, before_step, at_least)

    def newest_trusted(
        self,
        *,
        before_step: int | None = None,
        at_least: Trust = Trust.BYTES_VERIFIED,
        run_id: str | None = None,
        model: str | None = None,
    ) -> tuple[Manifest | None, list[Rejection]]:
        """Return the newest checkpoint that verdicts say can be trusted so far.

        Reads records and no bodies: whether its bytes are still what they were is for
        `newest_verified`, or for whoever restores from it, to see.

        Args:
            before_step: consider only earlier steps; for a corruption with a known onset.
            at_least: the level of trust that is asked for.
            run_id: accept only this run's; None accepts any.
            model: accept only this fingerprint; None accepts any.

        Returns:
            As `newest_verified`.

        Raises:
            StorageUnavailableError, StorageRefusedError: as `newest_verified`.
        """

        def why_not(record: CommitRecord) -> str:
            return _why_foreign(record, run_id=run_id, model=model)

        return self._first(why_not, before_step, at_least)

    def quarantine(self, step: int, epoch: int, reason: str) -> str:
        """Bar a checkpoint from being resumed from, and return the verdict's key.

        Its bytes stay until `retain` reaches it, for whoever looks into the incident. When a run
        goes back behind a corruption, quarantine every checkpoint from its onset on: the newest
        step wins otherwise, whatever epoch wrote it.
        """
        return self.judge(step, epoch, QUARANTINED, reason)

    def release(self, step: int, epoch: int, reason: str) -> str:
        """Take back what quarantine and suspicion there is; return the verdict's key.

        What is being deleted is not brought back.
        """
        return self.judge(step, epoch, RELEASED, reason)

    def judge(self, step: int, epoch: int, kind: str, reason: str) -> str:
        """Add a verdict, one of `verdicts.KINDS`, and return its key."""
        return verdicts.add(self.store, step, epoch, kind, reason)

    def standings(self) -> dict[Where, Standing]:
        """Return the standing of every checkpoint that there is a verdict about."""
        return verdicts.standings(self.store)

    def barred(self) -> dict[Where, str]:
        """Return by (step, epoch) the key of the verdict that bars a checkpoint.

        Only keys are looked at, so that a damaged verdict still counts, and a long history of
        deletions costs one listing.
        """
        return {where: one.barred for where, one in self.standings().items() if one.barred}

    def plan(self, ladder: Ladder, *, verified: Manifest | None = None) -> Retention | None:
        """Return what `retain` would do; None if nothing can be verified, and so nothing may go.

        Args:
            ladder: what to keep.
            verified: what `newest_verified` returned lately. Without it, it is asked now, which
                reads a whole checkpoint.

        Raises:
            ForeignCheckpointError: if there are checkpoints of more than one run. Each would be
                measured by the steps of the other, and the shorter one might lose all it has.
        """
        records = self.commits()
        readable = self._with_superseded(records)
        _require_one_run(readable)
        known = self.standings()
        barred = frozenset(where for where, standing in known.items() if standing.barred)
        whole = verified
        if whole is None or (whole.step, whole.epoch) in barred:
            whole, _ = self.newest_verified()
        if whole is None:
            # With nothing to fall back to, whatever is there is evidence or the last hope.
            return None
        candidates = [
            Candidate(r.step, r.epoch, known.get((r.step, r.epoch), Standing()).trust)
            for r in records
            if r.manifest and (r.step, r.epoch) not in barred
        ]
        stay = kept(candidates, ladder, restorable=(whole.step, whole.epoch))
        # Nothing is known of these: neither whose they are, nor that anything stands for them.
        foreign = {
            (r.step, r.epoch): f"not ours to judge: {r.fault}" for r in readable if r.unsupported
        }
        reasons = foreign | stay.reasons
        wheres = sorted((r.step, r.epoch) for r in records)
        victims = tuple(w for w in wheres if w < stay.oldest and w not in reasons)
        # Damaged, barred or superseded ones, too: they are evidence.
        for where in reversed(wheres):
            if where >= stay.oldest:
                reasons.setdefault(where, LATER)
        going = frozenset(where for where, standing in known.items() if standing.kind == DELETING)
        return Retention(kept=reasons, victims=victims, going=going)

    def retain(
        self,
        ladder: Ladder,
        *,
        verified: Manifest | None = None,
        leased: Callable[[int, int], bool] = lambda _step, _epoch: False,
        leases: Leases | None = None,
        agreed: Collection[Where] | None = None,
    ) -> list[Where]:
        """Delete the checkpoints that need not be kept, and the shards that can not be committed.

        Safe to repeat after a crash at any point.

        Args:
            ladder: what to keep; see `retention.kept` for what is kept besides.
            verified: see `plan`.
            leased: whether somebody reads, or is about to read, the checkpoint of this step and
                epoch; asked of each when its deletion is about to begin, and not after that.
            leases: those that readers have in the store.
            agreed: nothing else goes, neither checkpoints nor shards without one; None if whatever
                need not be kept may go.

        Returns:
            (step, epoch) of the checkpoints deleted, oldest first.

        Raises:
            ForeignCheckpointError: as `plan`; nothing was deleted.
        """
        planned = self.plan(ladder, verified=verified)
        if planned is None:
            return []
        deleted = []
        for step, epoch in planned.victims:
            if agreed is not None and (step, epoch) not in agreed:
                continue
            if (leases and leases.held(step, epoch)) or leased(step, epoch):
                continue
            # The verdict first: from here on nobody starts to read it. Then the commit, so that no
            # commit is visible without its shards. Of one that is barred for another reason, too:
            # it could be released, and who examines it has a lease.
            if (step, epoch) not in planned.going:
                self.judge(
                    step, epoch, DELETING, f"not among the newest {ladder.last}, nor kept for long"
                )
            # A reader that took its lease before it could see the verdict is seen here.
            if leases and leases.held(step, epoch):
                continue
            deleted.append((step, epoch))
            self.store.delete(commit_key(step, epoch))
            self._delete_shards(step, epoch)
        for where in self.orphans():
            if agreed is None or where in agreed:
                self._delete_shards(*where)
        if leases:
            leases.tidy()
        return deleted

    def orphans(self) -> list[Where]:
        """Return the generations that have shards and no commit, and that `commit` would refuse.

        The latest commit is asked for before the listing of commits: a generation that was
        committed before the latest one is then surely in that listing.
        """
        latest = latest_commit(self.store)
        committed = {parse_commit_key(key) for key in self.store.keys(COMMITS)}
        stored = {parse_generation_key(key) for key in self.store.keys(GENERATIONS)}
        found = sorted(where for where in stored - committed if where)
        return [where for where in found if latest is not None and where[::-1] < latest]

    def _entries(self) -> list[tuple[Where, int | None]]:
        """Return every commit, newest first, with the epoch by which it is superseded, if it is.

        Raises:
            StorageRefusedError: if there is a file where the folder of commits should be.
        """
        keys = self.store.keys(COMMITS)
        if not keys:
            self._require_folder()
        parsed = [parse_commit_key(key) for key in keys]
        entries: list[tuple[Where, int | None]] = []
        for step, epoch in sorted((found for found in parsed if found), reverse=True):
            newer = entries[-1][0][1] if entries and entries[-1][0][0] == step else None
            entries.append(((step, epoch), newer))
        return entries

    def _require_folder(self) -> None:
        """Tell a store without commits from one in which a file stands in their place."""
        name = COMMITS.rstrip("/")
        with suppress(BlobNotFoundError):
            self.store.size(name)
            raise StorageRefusedError(f"{name} is a file, expected a folder of commit records")

    def _first(
        self,
        why_not: Callable[[CommitRecord], str],
        before_step: int | None,
        at_least: Trust,
    ) -> tuple[Manifest | None, list[Rejection]]:
        """Return the newest that nothing speaks against; of others no record is read."""
        known = self.standings()
        rejections: list[Rejection] = []
        for entry in self._entries():
            (step, epoch), _ = entry
            if before_step is not None and step >= before_step:
                continue
            standing = known.get((step, epoch), Standing())
            sound = not standing.barred and standing.trust < at_least
            if standing.barred:
                reason = verdicts.reason_of(self.store, standing.barred)
            elif sound:
                reason = f"{standing.trust.words}, expected {at_least.words}"
            else:
                record = self._record(entry)
                reason = why_not(record)
                if not reason:
                    return record.manifest, rejections
            rejections.append(Rejection(step=step, epoch=epoch, reason=reason, sound=sound))
        return None, rejections

    def _record(self, entry: tuple[Where, int | None]) -> CommitRecord:
        (step, epoch), newer = entry
        if newer is not None:
            fault = f"superseded by epoch {newer}"
            return CommitRecord(step=step, epoch=epoch, manifest=None, fault=fault, superseded=True)
        manifest, fault, unsupported = None, "", False
        try:
            manifest = read_manifest(self.store, commit_key(step, epoch))
            if (manifest.step, manifest.epoch) != (step, epoch):
                fault = f"record is of another {describe(manifest)}"
                manifest = None
        except StorageError as error:
            if not is_of_content(error):
                raise
            fault, unsupported = str(error), isinstance(error, UnsupportedVersionError)
        return CommitRecord(
            step=step, epoch=epoch, manifest=manifest, fault=fault, unsupported=unsupported
        )

    def _with_superseded(self, records: Sequence[CommitRecord]) -> list[CommitRecord]:
        """Return the records and, of those that are superseded, also what is in them.

        They go first of all, and may be another run's, or of another version.
        """
        superseded = [((r.step, r.epoch), None) for r in records if r.superseded]
        return [*records, *parallel.each(self._record, superseded)]

    def _why_not(self, record: CommitRecord, *, run_id: str | None, model: str | None) -> str:
        """Return why a checkpoint cannot be resumed from; empty if it can."""
        foreign = _why_foreign(record, run_id=run_id, model=model)
        if foreign or record.manifest is None:
            return foreign
        try:
            check = partial(check_shard, self.store, completed(self.store, record.manifest))
            parallel.each(check, range(record.manifest.shards), at_once=SHARDS_AT_ONCE)
        except StorageError as error:
            if not is_of_content(error):
                raise
            return str(error)
        return ""

    def _delete_shards(self, step: int, epoch: int) -> None:
        parallel.each(self.store.delete, self.store.keys(generation_prefix(step, epoch)))


def _require_one_run(records: Sequence[CommitRecord]) -> None:
    """Check that all checkpoints are of one run, as far as their records can be read."""
    runs = sorted({record.manifest.run_id for record in records if record.manifest})
    if len(runs) > 1:
        raise ForeignCheckpointError(
            f"store has checkpoints of runs {', '.join(runs)}, expected one run; nothing was "
            "deleted"
        )


def _why_foreign(record: CommitRecord, *, run_id: str | None, model: str | None) -> str:
    """Return why a checkpoint is none of ours; empty if it is."""
    if record.manifest is None:
        return record.fault
    try:
        check_identity(record.manifest, run_id=run_id, model=model)
    except ForeignCheckpointError as error:
        return str(error)
    return ""
