"""Drives a controller through a simulated world, and kills it where it hurts.

The loop is the one that drives real worlds: decide, put on record, carry out. What is different is
that time is virtual, and that a controller may be killed between any two of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from orchestrator import compose
from orchestrator.core import journal, snapshot
from orchestrator.core.controller import Controller
from orchestrator.core.decisions import Decision
from orchestrator.core.events import ControllerStarted, Event
from orchestrator.protocol.ids import Seconds
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.simulated.world import SimulatedWorld

SNAPSHOT_EVERY = 250
"""Events between snapshots, where controllers are killed. Often enough that most successors go on
from one, and seldom enough to cost little beside the checks of every event."""


class Checker(Protocol):
    """Looks at every event and what was decided about it; raises AssertionError in its words."""

    def __call__(self, controller: Controller, event: Event, decisions: Sequence[Decision]) -> None:
        """Check one event that was handled."""
        ...


class Dying:
    """Decides when controllers are killed.

    Args:
        chance: every draw comes from it.
        rate: share of events at which it happens.
        until: not after this moment.
        down_s: longest that no controller is there.
    """

    def __init__(
        self, chance: np.random.Generator, rate: float, until: Seconds, down_s: float
    ) -> None:
        self._chance, self._rate, self._until, self._down_s = chance, rate, until, down_s

    def strikes(self, at: Seconds) -> bool:
        """Whether the controller is killed at this event."""
        return self._rate > 0 and at < self._until and self._chance.random() < self._rate

    def where(self, decisions: int) -> int:
        """Return at which line: -1 before it is on record, else after so many decisions."""
        return int(self._chance.integers(-1, decisions + 1))

    def down_s(self) -> float:
        """Return for how long nobody decides."""
        return float(self._chance.uniform(0.1, self._down_s))


class Simulation:
    """One run in virtual time.

    Args:
        run: what is run.
        world: where.
        checkers: asked at every event.
        dying: when controllers are killed; default never.
        record: takes what goes into the journal.
        keep: whether `entries` keeps it as well; a controller that is killed can not be succeeded
            without, and a month has millions.

    Attributes:
        controller: the one that decides at present.
        entries: the journal, if it is kept.
        events: how many the controller was told.
        controller_s: wall clock that it took to decide; asking for processor time costs more.
    """

    def __init__(
        self,
        run: TrainingRun,
        world: SimulatedWorld,
        *,
        checkers: Sequence[Checker] = (),
        dying: Dying | None = None,
        record: Callable[[journal.Entry], None] | None = None,
        keep: bool = True,
    ) -> None:
        self._run, self._world = run, world
        self._checkers, self._dying, self._record = tuple(checkers), dying, record
        self._keep = keep
        self.controller = compose.controller(run)
        self.entries: list[journal.Entry] = []
        self.events = 0
        self.controller_s = 0.0
        self._killed = False
        self._snapshot: tuple[int, bytes] | None = None
        """How many events there had been, and what the controller knew."""

    def conduct(self, until: Seconds) -> bool:
        """Run to the end, at most until a moment; return whether it has ended by then."""
        self._world.look_at(until)
        self._outlive(ControllerStarted(at=self._world.now, incarnation=1))
        for event in self._world.events():
            self._outlive(event)
            if self.controller.state.phase.final:
                return True
            if self._world.now >= until:
                return False
        return self.controller.state.phase.final

    def _outlive(self, event: Event) -> None:
        """Have an event handled, and another controller take over if this one is killed by that."""
        self._handle(event)
        # Its successor may be killed in turn, before it is on record that it took over.
        while self._killed or self._world.controller_killed:
            self._succeed()

    def _handle(self, event: Event) -> None:
        began_s = time.perf_counter()
        decisions = self.controller.handle(event)
        self.controller_s += time.perf_counter() - began_s
        dies_at = len(decisions) + 1
        if self._dying is not None and self._dying.strikes(self._world.now):
            dies_at = self._dying.where(len(decisions))
        if dies_at < 0:
            self._killed = True
            return
        self._append(event, decisions)
        if self._dying is not None and self.events % SNAPSHOT_EVERY == 0:
            self._snapshot = (self.events, snapshot.take(self.controller))
        # What is not on record was never decided.
        for check in self._checkers:
            check(self.controller, event, decisions)
        for number, decision in enumerate(decisions):
            if number == dies_at:
                self._killed = True
                return
            self._world.carry_out(decision)
        self._killed = dies_at == len(decisions)

    def _append(self, event: Event, decisions: Sequence[Decision]) -> None:
        self.events += 1
        if not self._keep and self._record is None:
            return
        entry = journal.Entry(seq=self.events, event=event, decisions=tuple(decisions))
        if self._keep:
            self.entries.append(entry)
        if self._record is not None:
            self._record(entry)

    def _succeed(self) -> None:
        """Have another controller take over from what is on record."""
        down_s = self._dying.down_s() if self._dying is not None else 0.5
        self._world.outlive_controller(down_s)
        self._killed = False
        assert self._keep, "nobody takes over from a journal that was not kept"
        self.controller = compose.controller(self._run)
        mismatches = journal.replay(self.controller, self.entries)
        assert not mismatches, f"event {mismatches[0].seq} is decided otherwise when replayed"
        if self._snapshot is not None:
            self._go_on_from(*self._snapshot)
        self._world.resume(self.controller.state, self.entries)
        incarnation = self.controller.state.incarnation + 1
        self._handle(ControllerStarted(at=self._world.now, incarnation=incarnation))

    def _go_on_from(self, events: int, taken: bytes) -> None:
        """Have the one decide that goes on from a snapshot, as live ones do."""
        whole = snapshot.take(self.controller)
        self.controller = snapshot.restore(taken, compose.controller(self._run))
        mismatches = journal.replay(self.controller, self.entries[events:])
        assert not mismatches, f"event {mismatches[0].seq} is decided otherwise from a snapshot"
        assert snapshot.take(self.controller) == whole, "a snapshot leads elsewhere than the events"
