"""How long to wait for others: what the phases of a recovery took, and what nobody could see.

Limits are learned apart for each way of coming back. To read a checkpoint of the durable tier takes
another time than to keep what is in memory, and a node that is new starts its processes first; what
one of them took says nothing about the other.
"""

from __future__ import annotations

from orchestrator.core.phases import RunPhase
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Seconds

CUT_ANEW = ", cut anew"
"""Ends the name of a way in which ranks read their state from the durable tier themselves."""
ON_A_NEW_NODE = ", on a new node"
"""Ends the name of a way in which a world has a node that had no seat before."""


def learn(state: RunState, *, whole: bool) -> None:
    """Take in how long the present phase has taken, at its end.

    Args:
        state: of the run.
        whole: whether it came to its end. One that was broken off teaches only that it takes longer
            than was thought; it is not known for that.
    """
    kind = _kind(state)
    known_s = state.phase_times.get(kind)
    spent_s = state.now - state.phase_since + state.unseen_s
    if whole:
        state.broken_off.pop(kind, None)
    else:
        state.broken_off[kind] = max(state.broken_off.get(kind, 0.0), spent_s)
    if whole or known_s is not None:
        state.phase_times[kind] = max(known_s or 0.0, spent_s)


def longest_s(state: RunState) -> float | None:
    """Return the longest that the present phase has taken so far, seconds; None if never seen."""
    return state.phase_times.get(_kind(state))


def broken_off_s(state: RunState) -> float:
    """Return how long the present phase has taken in vain since it last came to its end, or 0."""
    return state.broken_off.get(_kind(state), 0.0)


def forgive(state: RunState, gap_s: float) -> None:
    """Let no limit run for `gap_s` seconds, up to now, in which nobody was looking.

    Back-off is no limit on anybody, and goes on.
    """
    state.fleet.forgive(state.now)
    state.hearing.forgive(state.now)
    state.unseen_s += gap_s
    state.phase_since = Seconds(state.phase_since + gap_s)
    state.wanted_since = Seconds(state.wanted_since + gap_s)
    if state.asked_at is not None:
        state.asked_at = Seconds(state.asked_at + gap_s)
    state.troubled = {
        node: (Seconds(at + gap_s), message) for node, (at, message) in state.troubled.items()
    }


def _kind(state: RunState) -> tuple[RunPhase, str]:
    # Ranks that have their seats form a world in the same way wherever their state comes from.
    way = "" if state.phase is RunPhase.FORMING else state.way
    return state.phase, way
