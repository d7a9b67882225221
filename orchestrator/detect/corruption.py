"""Finds state that is wrong although nothing raised an error, as agents have told.

They compare digests and compute steps again; who is suspected, and since when, is their word. So it
is what ranks repaired by themselves: that is over when it is heard of.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core import repairs
from orchestrator.core.events import Event
from orchestrator.core.incident import CORRUPTION, REPAIR, Cause, Finding
from orchestrator.core.records import Repair
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Rank, Seconds, Step
from orchestrator.protocol.messages import StateDiverged


class Corruption:
    """Once for each time that the state diverged, or a node of the world is known to do that."""

    name = "corruption"

    def __init__(self) -> None:
        self._found: set[StateDiverged] = set()
        self._repaired = 0

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return a finding for each of which there was none."""
        del event  # the state has it all
        new = [fact for fact in state.diverged if fact not in self._found]
        self._found.update(new)
        repaired = state.repairs[self._repaired :]
        self._repaired = len(state.repairs)
        return [
            *(_finding(state, fact) for fact in new),
            *(_repair(state, repair) for repair in repaired),
        ]


def _finding(state: RunState, fact: StateDiverged) -> Finding:
    seats = {rank for node in fact.nodes for rank in state.ranks_of(node)}
    known = "no step is known to be good"
    if fact.since is not None:
        known = f"step {fact.since} is the last that is known to be good"
    proof = "proven" if fact.proven else "not proven"
    unrepaired = repairs.why_not(state, fact.step)
    return Finding(
        at=state.now,
        since=_moment(state, fact.since or Step(0)),
        kind=CORRUPTION,
        cause=Cause.STORAGE if fact.of_data else Cause.HARDWARE,
        ranks=tuple(Rank(rank) for rank in sorted(seats)),
        nodes=tuple(sorted(fact.nodes)),
        step=fact.step,
        evidence=f"{fact.evidence} ({proof}); found after step {fact.step}, {known}{unrepaired}",
    )


def _repair(state: RunState, repair: Repair) -> Finding:
    fact = repair.fact
    return Finding(
        at=state.now,
        since=Seconds(max(state.now - fact.seconds, 0.0)),
        kind=REPAIR,
        cause=Cause.HARDWARE,
        ranks=fact.ranks,
        nodes=(repair.node,),
        step=Step(fact.step - 1),
        evidence=repairs.words(fact),
        detail=repairs.remedy(fact),
        rung=repairs.rung(fact),
    )


def _moment(state: RunState, step: Step) -> Seconds:
    """Return when a step was complete: the onset is not before."""
    earlier = (at for done, at in reversed(state.step_log) if done <= step)
    return min(next(earlier, Seconds(0.0)), state.now)
