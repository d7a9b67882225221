"""The durable tier of a simulated cluster: which checkpoints it has, and when it answers."""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.core.decisions import CommitCheckpoint
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CommitFailed,
    SearchFailed,
)
from orchestrator.protocol.ids import Generation, Seconds, Step
from storage.manifest import commit_key

OUTAGE = "the store does not answer (503)"


class Stored(NamedTuple):
    """One committed checkpoint."""

    step: Step
    epoch: Generation
    shards: int

    @property
    def key(self) -> str:
        """Of its commit record."""
        return commit_key(self.step, self.epoch)


class SimStore:
    """Checkpoints, by what was committed.

    Attributes:
        down: whether it answers nobody.
        full: whether nothing can be written.
        delay_s: seconds that each write takes more.
        corrupt: keys of commits whose shards do not verify.
    """

    def __init__(self, keep_last: int) -> None:
        self._keep_last = keep_last
        self._commits: dict[str, Stored] = {}
        self._epoch_seen = Generation(0)
        self.down = self.full = False
        self.delay_s = 0.0
        self.corrupt: set[str] = set()

    def clear(self) -> None:
        """Let it be as large and as fast as it was."""
        self.full, self.delay_s = False, 0.0

    def newest(self) -> Stored | None:
        """Return the newest commit, sound or not."""
        return max(self._commits.values(), default=None)

    def find(self, key: str) -> Stored | None:
        """Return a sound checkpoint by its key."""
        return None if self.down or key in self.corrupt else self._commits.get(key)

    def spoil_after(self, step: Step) -> None:
        """Have what was committed after a step verify no more."""
        self.corrupt |= {key for key, stored in self._commits.items() if stored.step > step}

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
        stored = Stored(step, epoch, len(order.receipts))
        if epoch < newest and stored.key not in self._commits:
            reason = f"epoch is {epoch}, generation {newest} has begun"
            return CommitFailed(at=at, step=step, epoch=epoch, reason=reason)
        self._commits[stored.key] = stored
        for old in sorted(self._commits.values())[: -self._keep_last]:
            del self._commits[old.key]
        return CheckpointCommitted(at=at, step=step, epoch=epoch, key=stored.key)

    def search(self, number: int, at: Seconds) -> CheckpointFound | SearchFailed:
        """Return the newest sound checkpoint, and what was passed over, to whoever asked."""
        if self.down:
            return SearchFailed(at=at, reason=OUTAGE, again=True, number=number)
        rejected = []
        for stored in sorted(self._commits.values(), reverse=True):
            if stored.key not in self.corrupt:
                break
            rejected.append(f"step {stored.step}, epoch {stored.epoch}: digest differs")
        else:
            stored = None
        return CheckpointFound(
            at=at,
            step=stored.step if stored else None,
            epoch=stored.epoch if stored else None,
            key=stored.key if stored else "",
            rejected=tuple(rejected),
            reads=1 + len(self._commits),
            shards=stored.shards if stored else 0,
            epoch_seen=self._epoch_seen,
            number=number,
        )
