"""Who gets a seat: nodes that are well keep theirs, those that are gone give way to spares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from orchestrator.core.copies import strained
from orchestrator.core.incident import Cause
from orchestrator.core.phases import RunPhase
from orchestrator.core.plans import End, Plan, WaitForNodes
from orchestrator.core.records import Node
from orchestrator.core.state import RunState
from orchestrator.policy import networks, shrinking
from orchestrator.policy.devices import on_probation, suspected
from orchestrator.policy.lemons import repeated, retired
from orchestrator.policy.planned import leaving
from orchestrator.policy.stragglers import found_slow
from orchestrator.policy.suspicion import aside, suspects
from orchestrator.protocol.ids import NodeId, Seconds
from orchestrator.protocol.runfile import seconds
from orchestrator.protocol.seats import ranks_by_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Seats of a new generation, and which nodes changed."""

    seats: tuple[NodeId, ...]
    replicas: int
    replaced: tuple[tuple[NodeId, NodeId], ...] = ()
    """(old, new) for every node that was swapped."""
    evicted: tuple[NodeId, ...] = ()
    """Those of the old ones that leave for suspicion alone, the most suspected first."""


def place(state: RunState) -> Placement | None:
    """Return the seats of the next generation; None while nodes are missing."""
    if not state.seats:
        return _first(state)
    gone = _gone(state)
    replicas = _replicas_now(state, gone)
    if not replicas:
        return None
    frame = shrinking.frame(state, gone, replicas)
    lemons, probation, doubted = retired(state), on_probation(state), suspected(state)
    guilty = blamed(state) | strained(state) | lemons | aside(state) | found_slow(state).keys()
    guilty |= probation | networks.found_slow(state).keys()
    cold_since = _cold_since(state)
    spares = sorted(
        (*frame.freed, *state.spares()),
        key=lambda node: (
            node in state.drains,
            node in probation,
            node in lemons,
            node in guilty,
            node in doubted,
            cold_since.get(node, 0.0),
        ),
    )
    # A place of a replica that is new is nobody's yet.
    needed = len(frame.places) - sum(node is not None for node in frame.places)
    fresh = iter(spares[:needed])
    places = [next(fresh) if node is None else node for node in frame.places]
    swaps = {old: places[place] for place, old in frame.gone.items()}
    seated, left = set(places), spares[needed:]
    # Who is to be free does not go to another place.
    left = [node for node in left if node not in state.drains]
    out = [node for node in leaving(state) if node in seated]
    swaps |= dict(zip(out, left, strict=False))
    # What is left is for nodes that could go on. A spare that is under suspicion itself would
    # show nothing, and the two would change places at every restart.
    clean = [node for node in left[len(out) :] if node not in guilty]
    there = [node for node in suspects(state) if node in seated and node not in swaps]
    evicted = there[: len(clean)]
    accused = [node for node in places if node in guilty and node not in (*swaps, *evicted)]
    # Of two of which one has a slow network either may be sound: a single spare is not for luck.
    kept = networks.paired(state) if len(clean) < 2 else ()
    accused = [node for node in accused if node in state.seated and node not in kept]
    accused.sort(key=lambda node: (node not in probation, node not in lemons))
    swaps |= dict(zip([*evicted, *accused], clean, strict=False))
    return Placement(
        seats=_seats(state, [swaps.get(node, node) for node in places]),
        replicas=replicas,
        replaced=tuple(sorted(swaps.items())),
        evicted=tuple(evicted),
    )


def _cold_since(state: RunState) -> dict[NodeId, Seconds]:
    """Return when the spares came that a world would have to wait for: the first is warm first."""
    cold = set(state.spares()).difference(shrinking.ready(state))
    return {node: state.nodes[node].here_since for node in cold}


def _replicas_now(state: RunState, gone: Sequence[NodeId]) -> int:
    """Return with how many replicas a restart goes on now, 0 while nodes are waited for."""
    if _undecided(state, gone):
        return 0
    replicas = _replicas(state, gone)
    return 0 if shrinking.hope(state, gone, replicas) is not None else replicas


def _replicas(state: RunState, gone: Sequence[NodeId]) -> int:
    """Return with how many replicas a restart could go on now, 0 for with none."""
    there = len(state.seated) - len(gone) + len(state.spares())
    found = shrinking.wanted(state, there)
    if found <= state.replicas:
        return found
    return max(shrinking.wanted(state, there - _promised(state, gone)), state.replicas)


def _promised(state: RunState, gone: Sequence[NodeId]) -> int:
    """Return how many spares take the place of nodes that could go on, before any is to grow with.

    Whoever was asked to leave is to leave, and a fault that comes again where it was ends the run
    unless it was tried elsewhere; to grow back can wait for the next restart.
    """
    here = state.seated.keys() - set(gone)
    out = here & set(leaving(state))
    if state.incident is None or state.incident.cause is Cause.PLANNED:
        return len(out)
    at_fault = blamed(state) | strained(state)
    clean = set(state.spares()) - at_fault - retired(state) - aside(state)
    clean -= found_slow(state).keys() | on_probation(state)
    accused = (here & (at_fault | set(suspects(state)))) - out
    return len(out) + min(len(accused), len(clean))


def _seats(state: RunState, places: Sequence[NodeId]) -> tuple[NodeId, ...]:
    """Return the seats of a world of these nodes, each with as many ranks as there are on one."""
    per_node = state.run.spec.nodes.ranks_per_node
    seats = tuple(chain.from_iterable(repeat(node, per_node) for node in places))
    # Most restarts change nobody; then it is the same tuple, which is known at once.
    return state.seats if seats == state.seats else seats


def blamed(state: RunState) -> frozenset[NodeId]:
    """Return nodes on which one and the same fault struck twice, and which a spare may replace.

    Moving the rank tells hardware from software: if the fault comes along, it is the job's.
    """
    return frozenset(node for fault in repeated(state) for node in fault.nodes)


def wait_for_nodes(state: RunState) -> Plan | None:
    """Wait until every seat can be filled; give up after `recovery.spareWait`.

    It counts from when they could not be filled any more: what the recovery took before that,
    such as a search of the durable tier, is not time that a node had to come.
    """
    starting = not state.seats
    placed = _starting(state) > 0 if starting else _replicas_now(state, _gone(state)) > 0
    settled_at = Seconds(state.wanted_since + state.timeouts.form_s)
    if placed and not (starting and _spares_to_come(state) and state.now < settled_at):
        return None
    spare_wait_s = seconds(state.run.spec.recovery.spare_wait)
    patience_s = state.timeouts.warmup_s if starting else spare_wait_s
    since = state.phase_since if state.phase is RunPhase.GATHERING else state.now
    if not starting and (hope := _hope(state)) is not None:
        return WaitForNodes(until=hope.until, reason=hope.words)
    if not placed and state.phase is RunPhase.GATHERING and state.now < since + patience_s:
        return WaitForNodes(until=Seconds(since + patience_s), reason="nodes are still missing")
    until = settled_at if placed else _give_up_at(state, since + patience_s)
    if state.now >= until:
        return _give_up(state, patience_s)
    if starting:
        nodes = state.run.spec.nodes
        there = f"{_usable(state)} of {nodes.count + nodes.spares}"
        words = f"waiting for nodes: {there} are there{_quarantined(state)}"
        return WaitForNodes(until=until, reason=words)
    return WaitForNodes(
        until=until,
        reason=f"waiting for a node in place of {', '.join(_gone(state))}: "
        f"{len(state.spares())} spares are free, giving up after {patience_s:g} s"
        f"{shrinking.refusal(state, _usable(state))}",
    )


def _hope(state: RunState) -> shrinking.Hope | None:
    gone = _gone(state)
    return shrinking.hope(state, gone, _replicas(state, gone))


def buddies(state: RunState, seats: tuple[NodeId, ...]) -> dict[NodeId, NodeId]:
    """Return where each node of the world copies its shards: to the one half a world away.

    Neighbours share a switch, a rack, a line of power, and whatever takes two nodes at once mostly
    takes neighbours: of a copy next door nothing would be left. A world of one node uses a spare,
    if there is one: memory there is idle.

    Of an even number of nodes two are each other's buddy, so that any two that are lost at once are
    most rarely such as take a state with its copy. But if the network of one of them is slow, both
    ways are the same. Then each has a buddy other than whose buddy it is, which tells.
    """
    world = list(ranks_by_node(seats))
    if len(world) > 1:
        away = len(world) // 2
        kept = world[:away]
        pairs = zip(kept, world[away:], strict=True) if len(world) % 2 == 0 else ()
        if any(networks.not_told_apart(state, *pair) for pair in pairs):
            kept = [*kept[1:], kept[0]]
        return dict(zip(world, world[away:] + kept, strict=True))
    kept_out = {*world, *state.drains, *state.quarantined}
    others = [n.id for _, n in sorted(state.nodes.items()) if n.usable and n.id not in kept_out]
    return {world[0]: others[0]} if others else {}


def _first(state: RunState) -> Placement | None:
    """Return the seats of the first generation; with fewer replicas once nobody else will come."""
    count = _starting(state)
    if not count:
        return None
    probation, doubted = on_probation(state), suspected(state)
    nodes = sorted(state.spares(), key=lambda node: (node in probation, node in doubted))
    seats = _seats(state, nodes[:count])
    return Placement(seats=seats, replicas=len(seats) // state.shard_count())


def _starting(state: RunState) -> int:
    """Return on how many nodes the first generation can begin, 0 for not yet."""
    count, usable = state.run.spec.nodes.count, _usable(state)
    if usable >= count:
        return count
    if state.now < state.wanted_since + state.timeouts.warmup_s:
        return 0
    return shrinking.nodes_for(state.run, shrinking.fitting(state, usable))


def _gone(state: RunState) -> list[NodeId]:
    gone = (state.unfit | state.cordoned()) & state.seated.keys()
    return sorted(gone, key=lambda node: state.seated[node][0])


def _undecided(state: RunState, gone: Sequence[NodeId]) -> bool:
    """Whether some node is disconnected, and may be back at once; silence decides."""
    return any(_may_return(state.nodes[node]) for node in gone if node not in state.quarantined)


def _usable(state: RunState) -> int:
    out = state.unfit | {node for node in state.cordoned() if node in state.nodes}
    return len(state.nodes) - len(out)


def _spares_to_come(state: RunState) -> bool:
    nodes = state.run.spec.nodes
    # Who is here and kept out is not waited for.
    kept_out = sum(node in state.nodes for node in state.quarantined)
    return _usable(state) + kept_out < nodes.count + nodes.spares


def _may_return(node: Node) -> bool:
    """Whether it is no more than disconnected: nobody has said yet that it is gone."""
    return not (node.connected or node.lost or node.unusable)


def _give_up_at(state: RunState, at: float) -> Seconds:
    """Return when to give up, at the earliest `at`: not on nodes that may be back at once.

    A controller that starts has none connected, and they have until silence to call it.
    """
    silence_s = state.timeouts.silence_s
    known = [
        state.hearing.heard_at(node.id) + silence_s
        for node in state.nodes.values()
        if _may_return(node)
    ]
    return Seconds(max([at, *known]))


def _quarantined(state: RunState) -> str:
    """Say who is kept out, and where it stands what is held against a device; "" if nobody is."""
    if not state.quarantined:
        return ""
    where = " (`holdfast get devices`)" if any(q.device for q in state.quarantined.values()) else ""
    return f"; quarantined: {', '.join(sorted(state.quarantined))}{where}"


def _give_up(state: RunState, patience_s: float) -> Plan:
    if _undecided(state, _gone(state)):
        # Silence decides with the next tick, and this may be another event just before it.
        soon = Seconds(state.now + state.timeouts.tick_s)
        return WaitForNodes(until=soon, reason="a node is about to be taken for lost")
    kept_out = [node for node in sorted(state.drains) if state.drained(node)]
    last = f"; cordoned: {', '.join(kept_out)}" if kept_out else ""
    last += _quarantined(state)
    last += f"; last: {state.incident.findings[-1].evidence}" if state.incident else ""
    needed = shrinking.nodes_for(state.run, shrinking.least(state))
    return End(
        state="Failed",
        reason=f"needs {needed} nodes and has {_usable(state)}, "
        f"{len(state.spares())} of {state.run.spec.nodes.spares} spares free, "
        f"after waiting {patience_s:g} s{last}{shrinking.refusal(state, _usable(state))}",
    )
