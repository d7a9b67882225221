"""The durable tier as a world sees it: searches and commits in a thread, answers as events."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from orchestrator.core.decisions import CommitCheckpoint
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CommitFailed,
    Event,
    SearchFailed,
)
from orchestrator.protocol.ids import Generation, Seconds, Step
from orchestrator.protocol.runfile import TrainingRun
from storage.catalog import Catalog
from storage.commit import commit, newest_epoch
from storage.errors import StorageError
from storage.local import LocalStore, open_store
from storage.manifest import ShardReceipt, commit_key, make_manifest
from storage.wrappers import CountingStore, RetryingStore

log = logging.getLogger(__name__)
Tell = Callable[[Event], None]

LEFT_OVER_S = 3600.0
"""A file that nobody finished, nor has written to for so long, is of a writer that died."""
ANSWERS_MAX = 60
"""An answer that finds no room, for a second each time, is told this often."""


class Vault:
    """Commits and finds checkpoints of one run. Methods return at once; threads do the work.

    Args:
        run: whose checkpoints.
        uri: address of the store.
        clock: the run's clock, for stamping answers.
    """

    def __init__(self, run: TrainingRun, uri: str, clock: Callable[[], Seconds]) -> None:
        self.uri = uri
        self._run = run
        self._clock = clock
        self._opened = open_store(uri)
        self._store = RetryingStore(self._opened)
        self._thread = ThreadPoolExecutor(1, "holdfast-vault")
        self._thread.submit(self._sweep)

    def search(self, tell: Tell) -> None:
        """Find the newest verified checkpoint; answered by CheckpointFound or SearchFailed."""
        # Not behind commits, nor behind a search that hangs, and nobody waits for it to end.
        threading.Thread(
            target=self._search, args=(tell,), name="holdfast-search", daemon=True
        ).start()

    def commit(self, order: CommitCheckpoint, newest: Generation, tell: Tell) -> None:
        """Publish a commit record; answered by CheckpointCommitted or CommitFailed.

        Args:
            order: what to commit.
            newest: the newest generation known; an older one's commit is refused.
            tell: takes the answer.
        """
        self._thread.submit(self._commit, order, newest, tell)

    def close(self) -> None:
        """Finish what was asked for and end the thread."""
        self._thread.shutdown()

    def _search(self, tell: Tell) -> None:
        name = self._run.metadata.name
        store = CountingStore(self._store)
        catalog = Catalog(store)
        try:
            found, rejections = catalog.newest_verified(run_id=name)
            strangers = sorted(
                {
                    record.manifest.run_id
                    for record in catalog.commits()
                    if record.manifest is not None and record.manifest.run_id != name
                }
            )
            epoch_seen = newest_epoch(store)
        except Exception as error:  # noqa: BLE001 - a run must not wait for an answer for ever
            hint = getattr(error, "hint", type(error).__name__)
            again = isinstance(error, StorageError) and error.retryable
            _tell(tell, SearchFailed(at=self._clock(), reason=f"{error} ({hint})", again=again))
            return
        _tell(
            tell,
            CheckpointFound(
                at=self._clock(),
                step=Step(found.step) if found else None,
                epoch=Generation(found.epoch) if found else None,
                key=commit_key(found.step, found.epoch) if found else "",
                rejected=tuple(f"step {r.step}, epoch {r.epoch}: {r.reason}" for r in rejections),
                foreign=f"checkpoints of run {', '.join(strangers)}" if strangers else "",
                reads=store.reads,
                shards=found.shards if found else 0,
                epoch_seen=Generation(epoch_seen),
            ),
        )

    def _commit(self, order: CommitCheckpoint, newest: Generation, tell: Tell) -> None:
        step, epoch = order.step, order.generation
        parallelism = self._run.spec.parallelism
        try:
            manifest = make_manifest(
                (
                    ShardReceipt(shard=r.shard, size=r.size, index_digest=r.index_digest)
                    for r in order.receipts
                ),
                run_id=self._run.metadata.name,
                model=order.model,
                step=step,
                epoch=epoch,
                layout={
                    "dpReplicate": parallelism.dp_replicate,
                    "dpShard": len(order.receipts),
                },
            )
            commit(self._store, manifest, newest_epoch_known=newest)
        except Exception as error:  # noqa: BLE001 - the same
            again = isinstance(error, StorageError) and error.retryable
            why = f"{type(error).__name__}: {error}"
            _tell(
                tell,
                CommitFailed(at=self._clock(), step=step, epoch=epoch, reason=why, again=again),
            )
            return
        key = commit_key(step, epoch)
        _tell(tell, CheckpointCommitted(at=self._clock(), step=step, epoch=epoch, key=key))
        try:
            Catalog(self._store).retain(self._run.spec.checkpoint.keep_last, verified=manifest)
        except StorageError as error:
            # What could not be deleted now is deleted after the next commit.
            log.warning("old checkpoints stay for now: %s", error)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what writers that were killed left behind; readers never see it, disks do."""
        if not isinstance(self._opened, LocalStore):
            return
        try:
            swept = self._opened.sweep_old(LEFT_OVER_S)
        except StorageError as error:
            log.warning("unfinished files stay for now: %s", error)
            return
        if swept:
            log.info("removed %d unfinished files of dead writers", len(swept))


def _tell(tell: Tell, event: Event) -> None:
    """Pass on an answer; again if there is no room for it, since the run waits for it."""
    for _ in range(ANSWERS_MAX):
        try:
            tell(event)
        except queue.Full:
            log.warning("no room for %s yet; telling it again", type(event).__name__)
        else:
            return
