"""The durable tier as a world sees it: searches and commits in threads, answers as events.

A store may hang, for minutes or for good. No method here waits for it, and each order is answered
all the same: a commit within `commit_s`, a search by whoever asked for it, who stops waiting.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from orchestrator.core.decisions import CommitCheckpoint, JudgeCheckpoint
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CheckpointJudged,
    CommitFailed,
    Event,
    SearchFailed,
)
from orchestrator.core.trust import Onset, Verdict, why_not
from orchestrator.protocol.cutting import Cut, cut_of
from orchestrator.protocol.ids import Generation, Seconds, Step
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worlds.heap import give_back
from orchestrator.worlds.lane import Lane
from orchestrator.worlds.scrubbing import Scrubber
from storage.address import open_store
from storage.blob import BlobStore, Sweepable
from storage.catalog import Catalog, Rejection
from storage.commit import commit, newest_epoch
from storage.errors import StorageError, StorageRefusedError, StorageUnavailableError
from storage.leases import Leases
from storage.manifest import Manifest, ShardReceipt, commit_key, describe, make_manifest
from storage.retention import Ladder
from storage.scrub import DAMAGES_TOLD, Examined
from storage.verdicts import Trust
from storage.wrappers import CountingStore, RetryingStore

log = logging.getLogger(__name__)
Tell = Callable[[Event], None]
_Where = tuple[int, int]
"""Step and epoch of a checkpoint."""

LEFT_OVER_S = 3600.0
"""A file that nobody finished, nor has written to for so long, is of a writer that died."""
STAGES = "stagesPerRank"
"""Of a pipeline, in the layout of a checkpoint; not there if it is one."""
SEARCHES_MAX = 4
"""Searches at a time; so many only if they hang."""


class Vault:
    """Commits and finds checkpoints of one run. Methods return at once; threads do the work.

    Nothing is deleted from when a search is asked for until a later generation than the present one
    commits: what the search finds, or still reads, is restored from until then.

    Args:
        run: whose checkpoints.
        uri: address of the store.
        clock: the run's clock, for stamping answers.
        limits: how long to wait for the store.
        store: another way to what is at `uri`; opened from that if None.
    """

    def __init__(
        self,
        run: TrainingRun,
        uri: str,
        clock: Callable[[], Seconds],
        *,
        limits: Timeouts,
        store: BlobStore | None = None,
    ) -> None:
        self.uri = uri
        self._run = run
        self._clock = clock
        self._opened = open_store(uri) if store is None else store
        self._store = RetryingStore(self._opened)
        self._limits = limits
        self._generation = Generation(0)
        self._guard = _Guard()
        self._searching = threading.BoundedSemaphore(SEARCHES_MAX)
        self._commits = Lane("holdfast-commit", limits.commit_s)
        self._tidying = Lane("holdfast-tidy", limits.save_s)
        scrub_bytes_per_s = run.spec.checkpoint.scrub_mib_per_second * 2.0**20
        self._scrubber = Scrubber(self._store, scrub_bytes_per_s) if scrub_bytes_per_s else None
        # Leases end by a clock that all readers of the store share, more or less.
        self._leases = Leases(self._store, time.time)  # noqa: TID251
        self._tidy(self._sweep)

    def begin(self, generation: Generation) -> None:
        """Enter a generation; what older ones have ordered and is not begun yet is refused."""
        self._generation = generation

    def hold(self) -> None:
        """Delete nothing until a later generation than the present one commits."""
        self._guard.hold(self._generation)

    def search(
        self,
        tell: Tell,
        number: int = 0,
        onsets: Sequence[Onset] = (),
        *,
        graded: bool = False,
    ) -> None:
        """Find the newest verified checkpoint; answered by CheckpointFound or SearchFailed.

        What came after a silent corruption is barred first, for good: also from whoever searches
        without knowing of it.

        It comes after the commits that were ordered before it, be they done or late. One that hangs
        keeps no other one waiting, and nobody waits for it to end.

        Args:
            tell: takes the answer.
            number: of the search; its answer names it.
            onsets: of the corruptions that are known.
            graded: whether one that is compute verified comes before newer ones that are not.
        """
        generation = self._generation
        going, earlier = self._guard.hold(generation), self._commits.latest()
        if not self._searching.acquire(blocking=False):
            why = f"{SEARCHES_MAX} searches hang already"
            tell(self._failed(generation, number, why, again=True))
            return

        def work() -> None:
            try:
                earlier.wait(self._limits.commit_s)
                tell(self._look(generation, number, going, onsets, graded=graded))
            finally:
                self._searching.release()

        threading.Thread(target=work, name="holdfast-search", daemon=True).start()

    def commit(self, order: CommitCheckpoint, tell: Tell) -> None:
        """Publish a commit record; answered by CheckpointCommitted or CommitFailed.

        What is late is answered as failed, and once more if it is done after all.
        """
        step, epoch = order.step, order.generation
        answered = threading.Event()

        def fail(why: str, *, again: bool) -> None:
            answered.set()
            tell(CommitFailed(at=self._clock(), step=step, epoch=epoch, reason=why, again=again))

        def work() -> None:
            try:
                manifest = self._manifest(order)
                commit(self._store, manifest, newest_epoch_known=self._generation)
            except Exception as error:  # noqa: BLE001 - a run must not wait for an answer for ever
                why = f"{type(error).__name__}: {error}"
                if answered.is_set():
                    log.warning("step %d, epoch %d was late and then failed: %s", step, epoch, why)
                else:
                    fail(why, again=self._may_come(error, step))
                return
            answered.set()
            key = commit_key(step, epoch)
            tell(CheckpointCommitted(at=self._clock(), step=step, epoch=epoch, key=key))
            self._tidy(partial(self._retain, manifest))
            self._tidy(self._sweep)
            self._tidy(give_back)
            if self._scrubber is not None:
                self._scrubber.wake(partial(self._scrubbed, tell))

        def late() -> None:
            if not answered.is_set():
                limit_s = self._limits.commit_s
                fail(f"the durable tier did not answer within {limit_s:g} s", again=True)

        self._commits.submit(work, late)

    def judge(self, order: JudgeCheckpoint, tell: Tell) -> None:
        """Put a verdict on record beside a checkpoint; answered by CheckpointJudged.

        There is no answer while the store gives none: the verdict is then not on record.
        """

        def work() -> None:
            Catalog(self._store).judge(order.step, order.epoch, order.verdict, order.reason)
            tell(
                CheckpointJudged(
                    at=self._clock(),
                    step=order.step,
                    epoch=order.epoch,
                    verdict=order.verdict,
                    reason=order.reason,
                )
            )

        self._tidy(work)

    def settle(self, within_s: float) -> bool:
        """Wait until all that was ordered is done, or late; return whether it is by then."""
        deadline = time.monotonic() + within_s
        lanes = (self._commits, self._tidying)
        return all(lane.latest().wait(max(deadline - time.monotonic(), 0.0)) for lane in lanes)

    # In threads -----------------------------------------------------------------------------

    def _look(
        self,
        generation: Generation,
        number: int,
        going: frozenset[_Where],
        onsets: Sequence[Onset],
        *,
        graded: bool,
    ) -> Event:
        try:
            bar(Catalog(self._store), onsets)
            return self._find(generation, number, going, graded=graded)
        except Exception as error:  # noqa: BLE001 - the same
            hint = getattr(error, "hint", type(error).__name__)
            again = isinstance(error, StorageError) and error.retryable
            why = f"{error} ({hint})"
            return self._failed(generation, number, why, again=again)

    def _find(
        self, generation: Generation, number: int, going: frozenset[_Where], *, graded: bool
    ) -> CheckpointFound:
        name = self._run.metadata.name
        store = CountingStore(self._store)
        catalog = Catalog(store)
        found, rejections = None, list[Rejection]()
        if graded:
            found, rejections = catalog.newest_verified(
                run_id=name, at_least=Trust.COMPUTE_VERIFIED
            )
        grade = Verdict.COMPUTE_VERIFIED if found is not None else None
        if found is None:
            found, rejections = catalog.newest_verified(run_id=name)
        if found is not None and (found.step, found.epoch) in going:
            # Every newer one was rejected, and this one was let go before anybody searched.
            raise StorageUnavailableError(f"{describe(found)} is just being deleted")
        # Whose else's there are matters where there is none of ours, and only then all are read.
        records = catalog.commits() if found is None else []
        manifests = [record.manifest for record in records if record.manifest is not None]
        strangers = sorted({manifest.run_id for manifest in manifests} - {name})
        epoch_seen = newest_epoch(store)
        return CheckpointFound(
            at=self._clock(),
            generation=generation,
            step=Step(found.step) if found else None,
            epoch=Generation(found.epoch) if found else None,
            key=commit_key(found.step, found.epoch) if found else "",
            rejected=tuple(_words(r) for r in rejections if not r.sound),
            grade=grade,
            ungraded=tuple(_words(r) for r in rejections if r.sound),
            foreign=f"checkpoints of run {', '.join(strangers)}" if strangers else "",
            reads=store.reads,
            shards=found.shards if found else 0,
            cut=_cut(found) if found else None,
            epoch_seen=Generation(epoch_seen),
            number=number,
        )

    def _failed(
        self, generation: Generation, number: int, why: str, *, again: bool
    ) -> SearchFailed:
        return SearchFailed(
            at=self._clock(), generation=generation, number=number, reason=why, again=again
        )

    def _scrubbed(self, tell: Tell, examined: Examined) -> None:
        """Tell what came of reading a checkpoint back."""
        damages = "; ".join(map(str, examined.damages[:DAMAGES_TOLD]))
        tell(
            CheckpointJudged(
                at=self._clock(),
                step=Step(examined.step),
                epoch=Generation(examined.epoch),
                verdict=Verdict.SUSPECT if damages else Verdict.BYTES_VERIFIED,
                reason=f"scrub found {damages}" if damages else "every byte is what was staged",
            )
        )

    def _may_come(self, error: Exception, step: Step) -> bool:
        """Return whether a commit that failed may succeed if it is tried again.

        What is refused may be granted once somebody has seen to it. Only the last one of a run
        waits for that: after any other comes one that does as well.
        """
        last = step == self._run.spec.trainer.steps
        refused = isinstance(error, StorageRefusedError) and last
        return refused or (isinstance(error, StorageError) and error.retryable)

    def _manifest(self, order: CommitCheckpoint) -> Manifest:
        receipts, layout, cut = order.receipts, self._run.layout, cut_of(self._run)
        return make_manifest(
            (
                ShardReceipt(shard=r.shard, size=r.size, index_digest=r.index_digest)
                for r in receipts
            ),
            run_id=self._run.metadata.name,
            model=order.model,
            step=order.step,
            epoch=order.generation,
            layout={
                "pp": layout.pp,
                "dpReplicate": layout.dp_replicate,
                "dpShard": layout.dp_shard,
                "cp": layout.cp,
                "tp": layout.tp,
                **({STAGES: cut.stages_per_rank} if cut.stages_per_rank > 1 else {}),
            },
        )

    def _tidy(self, work: Callable[[], None]) -> None:
        """Have something done for which nobody waits, and which may as well be done later."""

        def carefully() -> None:
            try:
                work()
            except StorageError as error:
                log.warning("the durable tier is not tidied up for now: %s", error)
            except Exception:
                log.exception("the durable tier is not tidied up")

        limit_s = self._limits.save_s
        self._tidying.submit(
            carefully, lambda: log.warning("tidying the durable tier takes over %g s", limit_s)
        )

    def _retain(self, newest: Manifest) -> None:
        """Delete what is older than the checkpoints to keep, now that there is a newer one."""
        with self._guard.deleting(newest.epoch) as leased:
            keep = self._run.spec.checkpoint
            ladder = Ladder(
                last=keep.keep_last, every_steps=keep.keep_every_steps, anchors=keep.keep_anchors
            )

            def in_use(step: int, epoch: int) -> bool:
                # Asked first, for the guard takes down what it lets go of.
                scrubbed = self._scrubber is not None and self._scrubber.reads(step, epoch)
                return scrubbed or leased(step, epoch)

            Catalog(self._store).retain(ladder, verified=newest, leased=in_use, leases=self._leases)

    def _sweep(self) -> None:
        """Remove what writers that were killed left behind; readers never see it, disks do."""
        if not isinstance(self._opened, Sweepable):
            return
        swept = self._opened.sweep_old(LEFT_OVER_S)
        if swept:
            log.info("removed %d unfinished files of dead writers", len(swept))


def _cut(found: Manifest) -> Cut | None:
    """Return how a checkpoint says it is cut; None if it does not, as one that was imported."""
    sizes = [found.layout.get(name) for name in ("pp", "dpShard", "cp", "tp")]
    sizes.append(found.layout.get(STAGES, 1))
    told = [size for size in sizes if isinstance(size, int)]
    if len(told) != len(sizes) or Cut(*told).shards != found.shards:
        return None
    return Cut(*told)


def _words(passed_over: Rejection) -> str:
    return f"step {passed_over.step}, epoch {passed_over.epoch}: {passed_over.reason}"


def bar(catalog: Catalog, onsets: Sequence[Onset]) -> None:
    """Bar every checkpoint that came after a silent corruption; what is barred stays barred."""
    if not onsets:
        return
    barred = catalog.barred()
    for step, epoch in catalog.known():
        why = why_not(onsets, Step(step), Generation(epoch))
        if why and (step, epoch) not in barred:
            catalog.quarantine(step, epoch, why)


class _Guard:
    """Keeps apart what a search may hand out and what is deleted. For any thread.

    A commit of a later generation ends the hold: by then all its ranks have their state, whatever
    of an older generation is still on its way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = -1
        self._going: list[set[_Where]] = []

    def hold(self, generation: int) -> frozenset[_Where]:
        """Let nothing more go until a later generation commits; return what is going already."""
        with self._lock:
            self._held = max(self._held, generation)
            return frozenset().union(*self._going)

    @contextmanager
    def deleting(self, epoch: int) -> Iterator[Callable[[int, int], bool]]:
        """Let go of checkpoints, after a commit of generation `epoch`, that are not leased."""
        going: set[_Where] = set()

        def leased(step: int, epoch_of: int) -> bool:
            with self._lock:
                if epoch <= self._held:
                    return True
                going.add((step, epoch_of))
                return False

        with self._lock:
            self._going.append(going)
        try:
            yield leased
        finally:
            with self._lock:
                self._going = [other for other in self._going if other is not going]
