"""Gathers what nodes report into columns over all ranks, one row per tick.

Letters in array names: R ranks of the world.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from orchestrator.core.events import Telemetry
from orchestrator.protocol.ids import Generation, NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import Beat, StepReport

V = TypeVar("V")


class Columns:
    """Beats of all nodes since the last tick."""

    def __init__(self, world_size: int) -> None:
        self._size = world_size
        self._generation = Generation(0)
        self.reported = Step(0)
        """Last step of this generation that has been passed on, or is about to be."""
        self._reports: list[StepReport] = []
        self._heard: set[NodeId] = set()
        self._stall_s_R: dict[Rank, float] = {}
        self._stalled_s = 0.0
        self._clear()

    def begin(self, generation: Generation, restored: Step, world_size: int) -> None:
        """Forget what an older generation said; steps count from `restored` on."""
        self._generation, self._size = generation, world_size
        self.reported = restored
        self._reports = []
        self._stall_s_R = {}
        self._stalled_s = 0.0
        self._clear()

    def take(self, node: NodeId, beat: Beat) -> None:
        """Take in a beat; of an older generation only that the node was heard."""
        self._heard.add(node)
        if beat.generation != self._generation:
            return
        for place, rank in enumerate(beat.ranks):
            if not 0 <= rank < self._size:
                continue
            self._phases[rank] = beat.phases[place]
            self._steps[rank] = beat.steps[place]
            self._progress[rank] = beat.progress[place]
            self._states[rank] = beat.states[place]
            self._cpu_s[rank] = beat.cpu_s[place]
            # A rank's first beat says how long it stalled before anybody counted.
            before_s = self._stall_s_R.get(rank, beat.stall_s[place])
            self._stalled_s = max(self._stalled_s, beat.stall_s[place] - before_s)
            self._stall_s_R[rank] = beat.stall_s[place]
        for report in beat.reports:
            if report.step > self.reported:
                self.reported = report.step
                self._reports.append(report)

    def telemetry(self, at: Seconds) -> Telemetry | None:
        """Return everything since the last tick as one event; None if nobody was heard."""
        if not self._heard and not self._reports:
            return None
        event = Telemetry(
            at=at,
            generation=self._generation,
            heard=tuple(sorted(self._heard)),
            phases=_column(self._phases),
            steps=_column(self._steps),
            progress=_column(self._progress),
            states="".join(_column(self._states)),
            cpu_s=_column(self._cpu_s),
            stall_s=self._stalled_s,
            reports=tuple(self._reports),
        )
        self._reports = []
        self._stalled_s = 0.0
        self._clear()
        return event

    def flush(self, at: Seconds) -> Iterator[Telemetry]:
        """Yield what there is ahead of the tick, if it has steps in it."""
        if self._reports:
            event = self.telemetry(at)
            assert event is not None
            yield event

    def _clear(self) -> None:
        self._heard = set()
        self._phases = [-1] * self._size
        self._steps = [-1] * self._size
        self._progress = [-1] * self._size
        self._states = ["?"] * self._size
        self._cpu_s = [0.0] * self._size


def _column(values: list[V]) -> tuple[V, ...]:
    """Return a column over all ranks; one value, if it is the same for all of them."""
    if values.count(values[0]) == len(values):
        return (values[0],)
    return tuple(values)
