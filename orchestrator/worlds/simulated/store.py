"""The durable tier of a simulated cluster: which checkpoints it has, and when it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.core.decisions import CommitCheckpoint, JudgeCheckpoint
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CommitFailed,
    SearchFailed,
)
from orchestrator.core.trust import Onset, Verdict, why_not
from orchestrator.protocol import runfile
from orchestrator.protocol.cutting import Cut
from orchestrator.protocol.ids import Generation, Seconds, Step
from storage.manifest import commit_key
from storage.retention import Candidate, Ladder, kept
from storage.verdicts import Trust

OUTAGE = "the store does not answer (503)"


class Stored(NamedTuple):
    """One committed checkpoint."""

    step: Step
    epoch: Generation
    shards: int
    cut: Cut | None = None

    @property
    def key(self) -> str:
        """Of its commit record."""
        return commit_key(self.step, self.epoch)


class SimStore:
    """Checkpoints, by what was committed.

    Args:
        keep: which of them stay, and whether they are read back in the background.
        cut: how the run cuts its state.

    Attributes:
        down: whether it answers nobody.
        full: whether nothing can be written.
        delay_s: seconds that each write takes more.
        corrupt: keys of commits whose shards do not verify.
        barred: keys of commits that are not trusted, and why.
    """

    def __init__(self, keep: runfile.Checkpoint, cut: Cut | None = None) -> None:
        self._cut = cut
        self._ladder = Ladder(
            last=keep.keep_last, every_steps=keep.keep_every_steps, anchors=keep.keep_anchors
        )
        self._scrubs = keep.scrub_mib_per_second > 0
        self._trust: dict[str, Trust] = {}
        self._commits: dict[str, Stored] = {}
        self._epoch_seen = Generation(0)
        self.down = self.full = False
        self.delay_s = 0.0
        self.corrupt: set[str] = set()
        self.barred: dict[str, str] = {}

    def clear(self) -> None:
        """Let it be as large and as fast as it was."""
        self.full, self.delay_s = False, 0.0

    def newest(self) -> Stored | None:
        """Return the newest commit, sound or not."""
        return max(self._commits.values(), default=None)

    def find(self, key: str) -> Stored | None:
        """Return a sound checkpoint by its key."""
        unusable = key in self.corrupt or key in self.barred
        return None if self.down or unusable else self._commits.get(key)

    def leave(self, stored: Stored) -> None:
        """Have a checkpoint that a former life of the run committed."""
        self._commits[stored.key] = stored
        self.wrote(stored.epoch)

    def wrote(self, epoch: Generation) -> None:
        """Note that a generation has left something."""
        self._epoch_seen = max(self._epoch_seen, epoch)

    def commit(
        self, order: CommitCheckpoint, newest: Generation, at: Seconds
    ) -> CheckpointCommitted | CommitFailed:
        """Commit, unless a newer generation has begun; the same commit twice is one."""
        step, epoch = order.step, order.generation
        if self.down:
            return CommitFailed(at=at, step=step, epoch=epoch, reason=OUTAGE, again=True)
        stored = Stored(step, epoch, len(order.receipts), self._cut)
        if epoch < newest and stored.key not in self._commits:
            reason = f"epoch is {epoch}, generation {newest} has begun"
            return CommitFailed(at=at, step=step, epoch=epoch, reason=reason)
        self._commits[stored.key] = stored
        self._retain(stored)
        return CheckpointCommitted(at=at, step=step, epoch=epoch, key=stored.key)

    def judge(self, order: JudgeCheckpoint) -> None:
        """Take down what was found about a checkpoint."""
        key = commit_key(order.step, order.epoch)
        if order.verdict.good:
            level = next(level for level in Trust if level.kind == order.verdict)
            self._trust[key] = max(self._trust.get(key, level), level)
        else:
            self.barred.setdefault(key, order.reason)

    def bar(self, step: Step, reason: str) -> None:
        """Have nobody resume from the checkpoints of a step any more."""
        keys = [stored.key for stored in self._commits.values() if stored.step == step]
        self.barred |= dict.fromkeys(keys, reason)

    def _retain(self, newest: Stored) -> None:
        """Delete what need not be kept, by the rule of `storage.catalog`.

        What is older than the newest was read back by now, unless nobody does that.
        """
        candidates = [
            Candidate(stored.step, stored.epoch, self._trusted(key, stored, newest))
            for key, stored in self._commits.items()
            if key not in self.barred
        ]
        stay = kept(candidates, self._ladder, restorable=(newest.step, newest.epoch))
        self._commits = {
            key: stored
            for key, stored in self._commits.items()
            if (where := (stored.step, stored.epoch)) >= stay.oldest or where in stay.reasons
        }

    def _trusted(self, key: str, stored: Stored, newest: Stored) -> Trust:
        known = self._trust.get(key, Trust.WRITTEN)
        if not self._scrubs or stored is newest or key in self.corrupt:
            return known
        return max(known, Trust.BYTES_VERIFIED)

    def search(
        self, number: int, at: Seconds, onsets: Sequence[Onset] = (), *, graded: bool = False
    ) -> CheckpointFound | SearchFailed:
        """Return the newest sound checkpoint, and what was passed over, to whoever asked.

        What came after a silent corruption is barred first, for good. If that is asked for, what is
        compute verified comes before what is newer.
        """
        if self.down:
            return SearchFailed(at=at, reason=OUTAGE, again=True, number=number)
        for stored in self._commits.values():
            if why := why_not(onsets, stored.step, stored.epoch):
                self.barred[stored.key] = why
        found = rejected = ungraded = None
        if graded:
            found, rejected, ungraded = self._newest(Trust.COMPUTE_VERIFIED)
        grade = Verdict.COMPUTE_VERIFIED if found is not None else None
        if found is None:
            found, rejected, ungraded = self._newest(Trust.WRITTEN)
        return CheckpointFound(
            at=at,
            step=found.step if found else None,
            epoch=found.epoch if found else None,
            key=found.key if found else "",
            rejected=tuple(rejected or ()),
            grade=grade,
            ungraded=tuple(ungraded or ()),
            reads=1 + len(self._commits),
            shards=found.shards if found else 0,
            cut=found.cut if found else None,
            epoch_seen=self._epoch_seen,
            number=number,
        )

    def _newest(self, at_least: Trust) -> tuple[Stored | None, list[str], list[str]]:
        """Return the newest one that may be taken; what is wrong with newer ones, or lacking."""
        rejected: list[str] = []
        ungraded: list[str] = []
        for stored in sorted(self._commits.values(), reverse=True):
            name = f"step {stored.step}, epoch {stored.epoch}"
            trust = self._trust.get(stored.key, Trust.WRITTEN)
            if why := self.barred.get(stored.key):
                rejected.append(f"{name}: {why}")
            elif trust < at_least:
                ungraded.append(f"{name}: {trust.words}, expected {at_least.words}")
            elif stored.key in self.corrupt:
                rejected.append(f"{name}: digest differs")
            else:
                return stored, rejected, ungraded
        return None, rejected, ungraded
