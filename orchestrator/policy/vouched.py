"""Which states may be gone back to once state was wrong: those first that replays vouch for.

What is compared between replicas says nothing about gradients: a device that was wrong in one way
may have computed wrongly, too, since others last computed the same. So the newest state of before
the onset is taken of which that is known not to be so, if there is one, and else the newest.
"""

from __future__ import annotations

from orchestrator.core import vouching
from orchestrator.core.decisions import RestoreFrom
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Step

NAMED_MAX = 3
"""Of more states that were passed over, a reason says how many they are."""


def in_memory(state: RunState) -> Step:
    """Return up to which step copies in memory may be taken in preference to newer ones; 0: none.

    What memory has was made in the present lineage, which is the one that replays vouch for.
    """
    return state.replays_vouch_for if vouching.asked(state) else Step(0)


def committed(state: RunState) -> Step | None:
    """Return the newest checkpoint that is to be had in preference to newer ones; None for none."""
    if not vouching.asked(state) or (state.found is not None and state.found.grade is None):
        return None
    return vouching.newest(state)


def why(state: RunState, restore: RestoreFrom | None) -> str:
    """Say why a run goes back to a state, of all that are from before the onset, and not further.

    Empty if its state was not wrong, or there are no replays that could vouch for any.
    """
    if not vouching.asked(state) or restore is None:
        return ""
    found = state.found
    if not restore.commit and 0 < restore.step <= state.replays_vouch_for:
        words = f"replays vouch for the states up to step {state.replays_vouch_for}"
        return f"; {words}{_newer(state, restore.step)}"
    if restore.commit and found is not None and found.grade is not None:
        return f"; it is the newest that is compute verified{_newer(state, restore.step)}"
    return "; nothing from before the onset is compute verified"


def _newer(state: RunState, step: Step) -> str:
    """Say what was passed over that nothing is wrong with."""
    newer = [
        f"step {held} in memory" for held in sorted(state.holdings, reverse=True) if held > step
    ]
    newer += state.found.ungraded if state.found is not None else ()
    named = newer[:NAMED_MAX] + [f"{len(newer) - NAMED_MAX} more"] * (len(newer) > NAMED_MAX)
    return f", passed over {', '.join(named)}: no replay vouches for that" if named else ""
