"""Where every rank of a world stands that stands still: asked before anything is done about it.

The ranks that wait stand in a collective, all at one place; the one that they wait for stands
somewhere else, and that is often enough to see why. Once a generation is ended, nobody can look.
"""

from __future__ import annotations

from orchestrator.core.decisions import Decision, InspectRanks
from orchestrator.core.incident import HANG
from orchestrator.core.state import RunState, decide
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.messages import StacksTaken
from orchestrator.protocol.stacks import Stack

WITHIN_S = 2.0
"""For which what is done about it waits at most. To look takes a tenth of a second for a rank, and
seconds for one whose native frames are wanted."""
SHARE = 0.25
"""Of the time for which a world may stand still: whoever wants to be back soon waits less."""
PLACES_MAX = 64
"""Places of one incident that are kept."""


def look(state: RunState) -> list[Decision]:
    """Ask where ranks stand, once for each generation that stands still."""
    incident = state.incident
    if incident is None or incident.asked or incident.generation != state.generation:
        return []
    if incident.kind != HANG:
        return []
    incident.asked = True
    nodes = tuple(node for node in state.world if not state.nodes[node].lost)
    return [
        decide(
            state,
            InspectRanks,
            f"{incident.id}: nobody can see where ranks stand once they are moved on",
            nodes=nodes,
            suspects=incident.ranks,
            within_s=min(WITHIN_S, SHARE * state.timeouts.hang_s),
        )
    ]


def take(state: RunState, node: NodeId, fact: StacksTaken) -> None:
    """Enter what a node saw with the incident that it was asked for. A repeat changes nothing."""
    asked = [i for i in state.incidents if i.asked and i.generation == fact.generation]
    if not asked:
        return
    incident = asked[-1]
    if fact.problem:
        incident.unseen[node] = fact.problem
    ranks_of = {stack.frames: set(stack.ranks) for stack in incident.stacks}
    for stack in fact.stacks:
        if stack.frames in ranks_of:
            ranks_of[stack.frames].update(stack.ranks)
        elif len(ranks_of) < PLACES_MAX:
            ranks_of[stack.frames] = set(stack.ranks)
        else:
            incident.unseen[node] = f"more than {PLACES_MAX} places are known without its own"
    merged = [Stack(tuple(sorted(ranks)), frames) for frames, ranks in ranks_of.items()]
    merged.sort(key=lambda stack: (len(stack.ranks), stack.ranks))
    incident.stacks = tuple(merged)
