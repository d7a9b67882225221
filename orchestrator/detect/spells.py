"""How long ranks were seen to stand still in each phase of a step, in a world of one size."""

from __future__ import annotations

from orchestrator.core.fleet import StepTimes
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Generation
from orchestrator.protocol.phases import RankPhase


class Spells:
    """Of one run. In a world of another size nothing of it holds any more."""

    def __init__(self) -> None:
        self._known: dict[RankPhase, StepTimes] = {}
        self._generation, self._seats = Generation(0), 0

    def begin_anew(self, state: RunState) -> bool:
        """Return whether a generation began since the last look."""
        if state.generation == self._generation:
            return False
        if len(state.seats) != self._seats:
            self._known = {}
        self._generation, self._seats = state.generation, len(state.seats)
        return True

    def of(self, phase: RankPhase) -> StepTimes | None:
        """Return what is known of a phase, if anything is."""
        return self._known.get(phase)

    def learn(self, phase: RankPhase, seconds: float) -> None:
        """Take in a time for which ranks stood still."""
        self._known.setdefault(phase, StepTimes()).learn(seconds)
