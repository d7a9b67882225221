"""Where every rank of a world stands that stands still: asked before anything is done about it.

The ranks that wait stand in a collective, all at one place; the one that they wait for stands
somewhere else, and that is often enough to see why. Once a generation is ended, nobody can look.
"""

from __future__ import annotations

from orchestrator.core.decisions import Decision, InspectRanks
from orchestrator.core.incident import HANG
from orchestrator.core.state import RunState, decide
from orchestrator.protocol.ids import NodeId, Seconds
from orchestrator.protocol.messages import StacksTaken

WITHIN_S = 2.0
"""For which what is done about it waits at most. To look takes a tenth of a second for a rank, and
a second for one whose native frames are wanted."""
SHARE = 0.25
"""Of the time for which a world may stand still: whoever wants to be back soon waits less."""
SUSPECTS_MAX = 4
"""Of whom native frames are wanted: such a look takes 100 MB of a node for that second."""
PLACES_MAX = 64
"""Places of one incident that are kept."""
UNSEEN_MAX = 16
"""Nodes of one incident that could not look, of which it is kept: the reason is mostly the same."""


def look(state: RunState) -> list[Decision]:
    """Ask where ranks stand, once for each generation that stands still."""
    incident = state.incident
    if incident is None or incident.generation != state.generation:
        return []
    if incident.kind != HANG or incident.asked_until is not None:
        return []
    within_s = min(WITHIN_S, SHARE * state.timeouts.hang_s)
    nodes = tuple(node for node in state.world if not state.nodes[node].lost)
    incident.asked_until = Seconds(state.now + within_s + state.timeouts.silence_s)
    incident.unanswered = set(nodes)
    return [
        decide(
            state,
            InspectRanks,
            f"{incident.id}: nobody can see where ranks stand once they are moved on",
            nodes=nodes,
            suspects=incident.ranks[:SUSPECTS_MAX],
            within_s=within_s,
        )
    ]


def awaited(state: RunState) -> Seconds | None:
    """Return until when the end of a run waits for answers; None if none is due any more."""
    incident = state.incident
    if incident is None or incident.asked_until is None or state.now >= incident.asked_until:
        return None
    due = any(not state.nodes[node].lost for node in incident.unanswered)
    return incident.asked_until if due else None


def take(state: RunState, node: NodeId, fact: StacksTaken) -> None:
    """Enter what a node saw with the incident that it was asked for. A repeat changes nothing."""
    asked = [i for i in state.incidents if node in i.unanswered and i.generation == fact.generation]
    if not asked:
        return
    incident = asked[-1]
    incident.unanswered.discard(node)
    problem = fact.problem
    for stack in fact.stacks:
        if stack.frames in incident.places or len(incident.places) < PLACES_MAX:
            incident.places.setdefault(stack.frames, []).extend(stack.ranks)
        else:
            problem = problem or f"more than {PLACES_MAX} places are known without its own"
    if problem and len(incident.unseen) < UNSEEN_MAX:
        incident.unseen[node] = problem
