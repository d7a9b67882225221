"""Who gets a seat: nodes that are well keep theirs, those that are gone give way to spares."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.plans import End, Plan, WaitForNodes
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import NodeId, Rank, Seconds
from orchestrator.protocol.runfile import seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Seats of a new generation, and which nodes changed."""

    seats: tuple[NodeId, ...]
    replaced: tuple[tuple[NodeId, NodeId], ...] = ()
    """(old, new) for every node that was swapped."""


def place(state: RunState) -> Placement | None:
    """Return the seats of the next generation; None while nodes are missing."""
    if not state.seats:
        return _first(state)
    spares = list(state.spares())
    swaps: dict[NodeId, NodeId] = {}
    guilty = blamed(state)
    for node in state.world:
        known = state.nodes[node]
        if known.usable and node not in guilty:
            continue
        if not known.usable and not known.lost and not known.unusable:
            return None  # disconnected, and may be back at once; silence decides
        if spares:
            swaps[node] = spares.pop(0)
        elif not known.usable:
            return None
    seats = tuple(swaps.get(node, node) for node in state.seats)
    return Placement(seats=seats, replaced=tuple(sorted(swaps.items())))


def blamed(state: RunState) -> frozenset[NodeId]:
    """Return nodes on which one and the same fault struck twice, and which a spare may replace.

    Moving the rank tells hardware from software: if the fault comes along, it is the job's.
    """
    return frozenset(
        node
        for fault in state.occurrences.values()
        if len(fault.generations) > 1 and len(fault.nodes) == 1
        for node in fault.nodes
    )


def wait_for_nodes(state: RunState) -> Plan | None:
    """Wait until every seat can be filled; give up after `recovery.spareWait`."""
    needed = state.run.spec.nodes.count
    usable = [node for _, node in sorted(state.nodes.items()) if node.usable]
    starting = not state.seats
    patience_s = (
        state.timeouts.warmup_s if starting else seconds(state.run.spec.recovery.spare_wait)
    )
    until = Seconds(state.wanted_since + patience_s)
    if starting:
        everybody = needed + state.run.spec.nodes.spares
        settle = Seconds(state.wanted_since + state.timeouts.form_s)
        if len(usable) < everybody and not (len(usable) >= needed and state.now >= settle):
            if state.now >= until:
                return _give_up(state, patience_s)
            soonest = settle if len(usable) >= needed else until
            return WaitForNodes(
                until=soonest, reason=f"waiting for nodes: {len(usable)} of {everybody} are there"
            )
        return None
    if place(state) is not None:
        return None
    if state.now >= until:
        return _give_up(state, patience_s)
    gone = [n for n in state.world if not state.nodes[n].usable]
    return WaitForNodes(
        until=until,
        reason=f"waiting for a node in place of {', '.join(gone)}: "
        f"{len(state.spares())} spares are free, giving up after {patience_s:g} s",
    )


def buddies(state: RunState, seats: tuple[NodeId, ...]) -> dict[NodeId, NodeId]:
    """Return where each node of the world copies its shards: the next one, in a ring.

    A world of one node uses a spare, if there is one: memory there is idle.
    """
    world = list(dict.fromkeys(seats))
    if len(world) > 1:
        return {node: world[(i + 1) % len(world)] for i, node in enumerate(world)}
    others = [n.id for _, n in sorted(state.nodes.items()) if n.usable and n.id not in world]
    return {world[0]: others[0]} if others else {}


def _first(state: RunState) -> Placement | None:
    nodes = state.run.spec.nodes
    usable = sorted(n.id for n in state.nodes.values() if n.usable)[: nodes.count]
    if len(usable) < nodes.count:
        return None
    ranks = range(state.run.world_size)
    return Placement(seats=tuple(usable[Rank(r) // nodes.ranks_per_node] for r in ranks))


def _give_up(state: RunState, patience_s: float) -> Plan:
    usable = sum(node.usable for node in state.nodes.values())
    last = f"; last: {state.incident.findings[-1].evidence}" if state.incident else ""
    return End(
        state="Failed",
        reason=f"needs {state.run.spec.nodes.count} nodes and has {usable}, "
        f"{len(state.spares())} of {state.run.spec.nodes.spares} spares free, "
        f"after waiting {patience_s:g} s{last}",
    )
