"""What the state of a run does not keep: how often something happened, whoever was in charge."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from orchestrator.core.decisions import AbandonCheckpoint, CommitCheckpoint, Decision
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CheckpointJudged,
    CommitFailed,
    Event,
    Reported,
)
from orchestrator.core.journal import Entry
from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import WriteFailed


class Counts(msgspec.Struct):
    """Of one life of a run."""

    commits: int = 0
    failures: int = 0
    damages: int = 0
    bytes: int = 0
    ordered: dict[str, int] = {}
    """Bytes of checkpoints whose commit was ordered and is not answered yet, by step and epoch."""
    failing: str = ""
    """Step and epoch of the newest save that nodes say they could not stage or write."""

    def take(self, event: Event, decisions: Iterable[Decision]) -> None:
        """Take in an event and what was decided then, in the order of the journal."""
        match event:
            case CheckpointCommitted(step=step, epoch=epoch):
                self.commits += 1
                self.bytes += self.ordered.pop(_key(step, epoch), 0)
            case CommitFailed(step=step, epoch=epoch):
                self.failures += 1
                if not event.again:
                    self.ordered.pop(_key(step, epoch), None)
            case Reported(fact=WriteFailed(step=step, generation=generation)):
                # Each node says so of its own shards; it is one save.
                self.failures += self.failing != _key(step, generation)
                self.failing = _key(step, generation)
            case CheckpointJudged(verdict=verdict):
                self.damages += not verdict.good
            case CheckpointFound(rejected=rejected):
                self.damages += len(rejected)
            case _:
                pass
        for decision in decisions:
            if isinstance(decision, CommitCheckpoint):
                size = sum(receipt.size for receipt in decision.receipts)
                self.ordered[_key(decision.step, decision.generation)] = size
            elif isinstance(decision, AbandonCheckpoint):
                self.failures += 1

    def take_all(self, entries: Iterable[Entry]) -> Counts:
        """Take in entries of a journal, in order; return these counts."""
        for entry in entries:
            self.take(entry.event, entry.decisions)
        return self


def _key(step: Step, epoch: Generation) -> str:
    return f"{step}/{epoch}"
