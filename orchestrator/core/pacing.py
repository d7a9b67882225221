"""Has a run save as often as a policy says, and tells again what may have been lost."""

from __future__ import annotations

from orchestrator.core.decisions import Decision, SetCadence
from orchestrator.core.plans import Pacer
from orchestrator.core.state import RunState, decide
from orchestrator.protocol.ids import NodeId, Rank


class Pacing:
    """Of one run.

    Args:
        state: of the run.
        pacer: says how often; None leaves it at what the run file says.
    """

    def __init__(self, state: RunState, pacer: Pacer | None) -> None:
        self._state, self._pacer = state, pacer
        self._looked_at = (-1, 0)

    def look(self) -> list[Decision]:
        """Ask the policy, once for every save that came about."""
        state = self._state
        if self._pacer is None or state.wanting or state.reached_step <= state.start_step:
            return []
        saved = (state.retained, len(state.experience.write_s) and state.commits[-1].step)
        if saved == self._looked_at:
            return []
        self._looked_at = saved
        pace = self._pacer(state)
        if pace is None:
            return []
        state.cadence, state.cadence_reason = pace.cadence, pace.reason
        return [self._order()]

    def repeat(self, node: NodeId) -> list[Decision]:
        """Tell a node again that has joined with rank 0, if anything was changed meanwhile."""
        state = self._state
        if state.cadence == state.cadence_begun or node not in state.seated:
            return []
        return [self._order()] if Rank(0) in state.ranks_of(node) else []

    def _order(self) -> SetCadence:
        state = self._state
        return decide(
            state, SetCadence, state.cadence_reason, node=state.seats[0], cadence=state.cadence
        )
