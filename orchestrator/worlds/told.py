"""Which entries of a journal a world resumes from: a handful, of millions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from orchestrator.core.decisions import StartGeneration
from orchestrator.core.events import FaultInjected, Reported, Telemetry
from orchestrator.core.journal import Entry
from orchestrator.protocol.messages import FaultCarriedOut

GENERATIONS = 2
"""Orders that started one: the present world, and the one before, by whose ranks it is told who
has to go (`worlds.orders`)."""


class Told:
    """Keeps what `AgentWorld.resume` looks at.

    Args:
        entries: of the journal so far, in order; or what another one kept of them.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._started: deque[Entry] = deque(maxlen=GENERATIONS)
        self._faults: list[Entry] = []
        self._first_step: Entry | None = None
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Take in the next entry."""
        if any(isinstance(decision, StartGeneration) for decision in entry.decisions):
            self._started.append(entry)
        match entry.event:
            case FaultInjected() | Reported(fact=FaultCarriedOut()):
                self._faults.append(entry)
            case Telemetry(reports=reports) if reports and self._first_step is None:
                self._first_step = entry
            case _:
                pass

    def entries(self) -> list[Entry]:
        """Return what is kept, in the order of the journal."""
        kept = {entry.seq: entry for entry in (*self._started, *self._faults)}
        if self._first_step is not None:
            kept[self._first_step.seq] = self._first_step
        return [entry for _, entry in sorted(kept.items())]
