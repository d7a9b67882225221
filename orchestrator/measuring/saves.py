"""What steps and saves took, taken from the journal of a live run."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.core.decisions import CommitCheckpoint, StartGeneration
from orchestrator.core.events import CheckpointCommitted, CopiesHeld, Reported, Telemetry
from orchestrator.core.journal import Entry
from orchestrator.measuring.samples import Samples
from orchestrator.protocol.ids import NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import ShardsHeld


class _Taking:
    """Goes through a journal once."""

    def __init__(self, memory_every: int) -> None:
        self.samples = Samples()
        self._memory_every = memory_every
        self._seats: tuple[NodeId, ...] = ()
        self._start = Step(0)
        self._staged: dict[tuple[Rank, Step], Seconds] = {}
        self._copied: set[tuple[Rank, Step]] = set()
        self._written: dict[Step, Seconds] = {}
        self._generation = 0

    def see(self, entry: Entry) -> None:
        """Take in an event and what was decided."""
        event = entry.event
        match event:
            case Telemetry():
                self._steps(event)
            case Reported(node=node, fact=ShardsHeld() as held):
                self._holds(event.at, node, held)
            case CopiesHeld() if event.generation == self._generation:
                for rank in range(len(self._seats)):
                    self._hold(event.at, Rank(rank), event.step, own=not event.copied)
            case CheckpointCommitted(step=step) if step in self._written:
                self.samples.add("commit", event.at - self._written.pop(step))
        for decision in entry.decisions:
            if isinstance(decision, StartGeneration):
                self._begin(decision)
            elif isinstance(decision, CommitCheckpoint) and decision.step not in self._written:
                self._write(event.at, decision.step)

    def _write(self, at: Seconds, step: Step) -> None:
        """Every shard of a step is written: its commit is ordered."""
        self._written[step] = at
        staged = [staged_at for (_, of), staged_at in self._staged.items() if of == step]
        if staged:
            self.samples.add("write", at - min(staged))

    def _begin(self, order: StartGeneration) -> None:
        self._generation, self._seats = order.generation, order.seats
        self._start = order.restore.step if order.restore else Step(0)
        self._staged.clear()
        self._copied.clear()

    def _steps(self, event: Telemetry) -> None:
        # The first step of a generation is longer, and has a constant of its own.
        for report in event.reports:
            if report.step > self._start + 1:
                self.samples.add("step", report.seconds)
        saves = sum(report.step % self._memory_every == 0 for report in event.reports)
        if saves and event.stall_s:
            self.samples.add("stall", event.stall_s / saves)

    def _holds(self, at: Seconds, node: NodeId, held: ShardsHeld) -> None:
        if held.generation == self._generation:
            for holding in held.holdings:
                if holding.rank >= len(self._seats):
                    continue  # staged when there were more replicas
                own = node == self._seats[holding.rank]
                self._hold(at, holding.rank, holding.step, own=own)

    def _hold(self, at: Seconds, rank: Rank, step: Step, *, own: bool) -> None:
        if step <= self._start:
            return  # of an older generation
        shard = rank, step
        if own:
            self._staged.setdefault(shard, at)
        elif shard in self._staged and shard not in self._copied:
            self._copied.add(shard)
            self.samples.add("copy", at - self._staged[shard])


def take(entries: Iterable[Entry], memory_every: int) -> Samples:
    """Return what steps and saves took.

    Args:
        entries: of the journal of a live run, in order.
        memory_every: steps between two saves to memory.
    """
    taking = _Taking(memory_every)
    for entry in entries:
        taking.see(entry)
    return taking.samples
