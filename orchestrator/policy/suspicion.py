"""Who leaves when ranks hang or lose each other again, and nobody knows for certain why.

Once is bad luck: a restart in place costs least, and its evidence is kept. Again within an hour,
the nodes leave that the evidence named both times; or, if it named others, the smallest parallel
group that has all of those it names. Most of them are well, and that is the bargain: ByteRobust
(arXiv 2509.16293) evicts a group of 8 machines of which 6 or 7 are, rather than look for the one; a
hang took 1.5 h to localise by hand. Nobody is condemned: who left is a spare, the last to be taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from orchestrator.core.incident import Incident
from orchestrator.core.state import RunState
from orchestrator.policy.arithmetic import DAY_S
from orchestrator.policy.switches import OVER_EVICTION, enabled
from orchestrator.protocol.ids import NodeId

KINDS = ("hang", "broken-collective")
AGAIN_S = 3_600.0
"""Assumed. Of the 42 hangs and network failures of Llama 3 in 54 days (arXiv 2407.21783, Table 5),
any one had another within an hour by chance with 3 %."""
SHARE = 1 / 16
"""Of the nodes of a world that leave at most at a time, but for one. Assumed."""
ASIDE_DAYS = 7
"""For how long who left is the last to be taken. Assumed."""


def most(state: RunState) -> int:
    """Return how many nodes may leave at a time for suspicion alone."""
    return max(int(state.run.spec.nodes.count * SHARE), 1)


def suspects(state: RunState) -> tuple[NodeId, ...]:
    """Return who should leave because of the open incident, the most suspected first, if any."""
    incident = state.incident
    if incident is None or incident.kind not in KINDS or not enabled(state, OVER_EVICTION):
        return ()
    now = evidence(state, incident)
    before = [evidence(state, former) for former in _before(state, incident)]
    if not now or not any(before):
        return ()
    times = Counter(node for nodes in before for node in nodes)
    again = [node for node in now if times[node]]
    if not again and len(now) == 1 and all(len(nodes) <= 1 for nodes in before):
        return ()  # it goes from node to node: it is none of them
    # Evidence that names most of the world is as good as none.
    sets = (again, _groups(state, now), list(now))
    named = next((s for s in sets if 0 < len(s) <= len(state.seated) // 2), [])
    ranked = sorted(named, key=lambda node: -times[node])
    return tuple(ranked[: most(state)])


def evidence(state: RunState, incident: Incident) -> tuple[NodeId, ...]:
    """Return the nodes of the world that an incident names, or else where it showed first."""
    named = incident.nodes or tuple(node for f in incident.findings for node in f.around)
    return tuple(node for node in dict.fromkeys(named) if node in state.seated)


def aside(state: RunState) -> frozenset[NodeId]:
    """Return who left lately for suspicion alone."""
    if not enabled(state, OVER_EVICTION):
        return frozenset()
    since = state.now - ASIDE_DAYS * DAY_S
    found: set[NodeId] = set()
    for incident in reversed(state.incidents):
        if incident.detected_at < since:
            break
        found.update(incident.evicted)
    return frozenset(found)


def standing(state: RunState, node: NodeId) -> str:
    """Return why a node is a spare of last resort, in words; "" if it is not for suspicion."""
    for incident in reversed(state.incidents) if node in aside(state) else ():
        if node in incident.evicted:
            return f"put aside in {incident.id}: suspected of a {incident.kind}, not proven"
    return ""


def _before(state: RunState, incident: Incident) -> Iterator[Incident]:
    """Yield those of the same sort that came within the hour before."""
    for former in reversed(state.incidents):
        if incident.detected_at - former.detected_at > AGAIN_S:
            return
        if former is not incident and former.kind in KINDS:
            yield former


def _groups(state: RunState, nodes: tuple[NodeId, ...]) -> list[NodeId]:
    """Return the nodes of every replica that some nodes are part of, those nodes first."""
    layout = state.run.layout
    replicas = {layout.replica_of(rank) for node in nodes for rank in state.ranks_of(node)}
    seats = [state.seats[rank] for r in sorted(replicas) for rank in layout.ranks_of(r)]
    return list(dict.fromkeys([*nodes, *seats]))
