"""What the device ledger is to one run: who is kept out for it, and what the run adds to it.

The ledger outlives runs and is written by many of them; a run knows of it what events say. A device
that is barred keeps its node out in the way in which any node is quarantined, for as long as it is
barred and no longer. What is proven here is ordered to be put on record there, once, by name:
ordered again by a successor, it is the same verdict.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec

from orchestrator.core import watching
from orchestrator.core.decisions import Decision, JudgeDevice, PreflightDevices
from orchestrator.core.events import (
    ControllerStarted,
    DeviceJudged,
    DeviceKnown,
    DevicesKnown,
    Event,
    Inherited,
    Telemetry,
)
from orchestrator.core.records import Drain, Node, Quarantined
from orchestrator.core.standing import TRANSITIONS, Act, Actor, Proof, Standing
from orchestrator.core.state import RunState, decide
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Generation, NodeId, Rank, Serial
from orchestrator.protocol.messages import Joined, NodeUnusable, Preflighted

PROBATION_STEPS = 1000
"""Watched steps that clear a device. Source: reference targets."""
PREFLIGHT_S = 10.0
"""How long a node computes what is known beforehand. Of a fault that shows in a share p of the
answers, n of them find it with 1 - (1 - p)^n: few, whatever the time. Assumed."""
SUSPECTS_MAX = 2
"""Whoever names more points at nobody: of two that differ it may be either."""
LEDGER = "device-ledger"
"""Who asked for a drain, if it was not a person."""
_WATCHED = (Standing.SUSPECT, Standing.PROBATION)
_CONVICTED = (Standing.QUARANTINED, Standing.RETIRED)


# What is known --------------------------------------------------------------------------------


def know(state: RunState, told: DevicesKnown) -> None:
    """Enter what the ledger says now. If not all could be read, what was known stays known."""
    state.devices_problem = told.problem
    known = state.devices if told.problem else {}
    state.devices = known | {device.serial: device for device in told.devices}
    _look_again(state)


def judged(state: RunState, told: DeviceJudged) -> None:
    """Enter that a verdict is on record."""
    state.judging_devices.pop(told.id, None)
    state.devices[told.device.serial] = told.device
    _look_again(state)


def inherit(state: RunState, left: Inherited) -> None:
    """Take over what a former life knew of the ledger, and what it could not add any more."""
    state.devices = {device.serial: device for device in left.devices}
    state.judging_devices = {order.id: order for order in left.judging}


def left_by(former: RunState) -> tuple[DeviceKnown, ...]:
    """Return what a life that is over knew of the ledger, with what is on its way there."""
    pending = {order.device.serial: order for order in former.judging_devices.values()}
    known = former.devices | {
        serial: DeviceKnown(serial, standing_of(former, serial), order.reason)
        for serial, order in pending.items()
    }
    return tuple(device for _, device in sorted(known.items()))


def standing_of(state: RunState, serial: Serial) -> Standing:
    """Return where a device stands, once what is ordered is on record."""
    known = state.devices.get(serial)
    standing = Standing.HEALTHY if known is None else known.standing
    for order in state.judging_devices.values():
        if order.device.serial == serial:
            standing = TRANSITIONS[order.act].get(standing, standing)
    return standing


def why(state: RunState, serial: Serial) -> str:
    """Return the reason of the newest verdict about a device; "" if there is none."""
    said = [o.reason for o in state.judging_devices.values() if o.device.serial == serial]
    known = state.devices.get(serial)
    return said[-1] if said else known.why if known is not None else ""


def nodes_in(state: RunState, *standings: Standing) -> frozenset[NodeId]:
    """Return the nodes that have a device which stands so."""
    if not (state.devices or state.judging_devices):
        return frozenset()  # as nearly always; asked for at every restart
    return frozenset(
        node.id
        for node in state.nodes.values()
        if any(standing_of(state, device.serial) in standings for device in of(state, node))
    )


# Who is kept out ------------------------------------------------------------------------------


def join(state: RunState, node: Node, joined: Joined) -> None:
    """Enter what a node is made of. One that can not tell any more is what it was."""
    if joined.devices:
        if {device.serial for device in node.devices}.isdisjoint(d.serial for d in joined.devices):
            node.machine_since = state.generation
        node.devices = joined.devices
    _claim(state, node)
    node.devices_unknown = joined.devices_unknown
    # An order that it had may be lost with its connection.
    state.preflights.pop(node.id, None)
    admit(state, node)


def _claim(state: RunState, node: Node) -> None:
    """Enter whose devices they are, and which of them can not be only one node's."""
    before = len(state.ambiguous)
    for serial in [device.serial for device in node.devices]:
        other = state.nodes.get(state.claimed.get(serial, node.id))
        if other is not None and other is not node and other.serves:
            # For good: which of them is here does not say which of them it was.
            state.ambiguous.add(serial)
        state.claimed[serial] = node.id
    if len(state.ambiguous) > before:
        _look_again(state)


def of(state: RunState, node: Node) -> list[Device]:
    """Return the devices of a node that no other has."""
    return [device for device in node.devices if device.serial not in state.ambiguous]


def came_later(state: RunState, node: NodeId, generation: Generation) -> bool:
    """Whether the machine that has this name now took no part in a generation."""
    known = state.nodes.get(node)
    return known is not None and 0 < generation <= known.machine_since


def admit(state: RunState, node: Node) -> None:
    """Keep a node out while one of its devices is barred, and no longer for that."""
    standings = [(device, standing_of(state, device.serial)) for device in of(state, node)]
    barred = [(device, standing) for device, standing in standings if standing.barred]
    known = state.quarantined.get(node.id)
    if not barred:
        if known is not None and known.device:
            del state.quarantined[node.id]
        drain = state.drains.get(node.id)
        if drain is not None and drain.request == LEDGER:
            del state.drains[node.id]
        state.retesting.discard(node.id)
        return
    if all(standing is Standing.RETEST for _, standing in barred):
        state.retesting.add(node.id)
    else:
        state.retesting.discard(node.id)
    device, standing = barred[0]
    words = (
        f"for its {device.kind} {device.serial}, which is {_words(standing)}: "
        f"{why(state, device.serial)}"
    )
    if known is None and node.id in state.seated and not state.wanting:
        _drain(state, node, words)
    elif known is None or known.device:
        since = state.now if known is None else known.since
        state.quarantined[node.id] = Quarantined(
            node=node.id, since=since, why=words, device=device.serial
        )


def _words(standing: Standing) -> str:
    return "to be tested" if standing is Standing.RETEST else f"{standing}"


def _drain(state: RunState, node: Node, words: str) -> None:
    """Have a node that trains give its seats up when that costs least: nothing of it is wrong."""
    if node.id not in state.drains:
        state.drains[node.id] = Drain(
            node=node.id,
            asked_at=state.now,
            by="the device ledger",
            reason=words,
            until=None,
            incarnation=node.incarnation,
            request=LEDGER,
        )


def _look_again(state: RunState) -> None:
    for _, node in sorted(state.nodes.items()):
        if node.devices:
            admit(state, node)
    state.watched = {
        serial: state.watched.get(serial, 0)
        for serial in sorted(state.devices)
        if standing_of(state, serial) in _WATCHED
    }


# What the run adds ----------------------------------------------------------------------------


def convict(
    state: RunState, nodes: Iterable[NodeId], ranks: Sequence[Rank], proof: Proof, evidence: str
) -> dict[NodeId, Serial]:
    """Have it put on record that it was these nodes' devices.

    Returns:
        By node, the device that it is held against; none of a node whose devices nobody knows.
    """
    found: dict[NodeId, Serial] = {}
    for node in nodes:
        for device in _implicated(state, node, ranks):
            found.setdefault(node, device.serial)
            # Of one fault there may be several proofs; a second one that counts comes after a test.
            if standing_of(state, device.serial) not in _CONVICTED:
                _judge(state, device, node, Act.CONVICTED, evidence, proof=proof)
    return found


def suspect(state: RunState, nodes: Sequence[NodeId], ranks: Sequence[Rank], evidence: str) -> None:
    """Have it put on record that something points to these nodes, if it points to anybody."""
    if len(nodes) > SUSPECTS_MAX:
        return
    for node in nodes:
        for device in _implicated(state, node, ranks):
            if device.serial in state.watched:
                state.watched[device.serial] = 0
            if standing_of(state, device.serial) is Standing.HEALTHY:
                _judge(state, device, node, Act.SUSPECTED, evidence)


def stands(
    state: RunState, node: NodeId, ranks: Sequence[Rank], standings: Collection[Standing]
) -> bool:
    """Whether a device that ranks of a node compute on stands so."""
    used = _implicated(state, node, ranks)
    return any(standing_of(state, device.serial) in standings for device in used)


def break_down(state: RunState, node: Node, fact: NodeUnusable) -> None:
    """Have an error of the hardware put on record; an agent says it again when it reconnects."""
    if fact.reason == node.unusable:
        return
    for device in of(state, node):
        if device.serial == fact.serial and standing_of(state, device.serial) not in _CONVICTED:
            _judge(state, device, node.id, Act.CONVICTED, fact.reason, proof=Proof.HARDWARE)


def release(state: RunState, nodes: Iterable[NodeId], by: str) -> None:
    """Take it as a person's word about the devices of nodes that these may be used again."""
    for node in (state.nodes[name] for name in nodes if name in state.nodes):
        for device in of(state, node):
            standing = standing_of(state, device.serial)
            if standing.barred and standing is not Standing.RETEST:
                words = f"{node.id} may be used again"
                _judge(state, device, node.id, Act.RELEASED, words, actor="operator", by=by)
        # What came of a test before may have been why.
        state.preflights.pop(node.id, None)
        admit(state, node)


def answer(state: RunState, node: Node, fact: Preflighted) -> None:
    """Enter what a node computed of what is known beforehand. Said again, it changes nothing."""
    if state.preflights.get(node.id) != "":
        return
    if fact.problem:
        state.preflights[node.id] = fact.problem
        return
    del state.preflights[node.id]
    by = f"the agent of {node.id}"
    for device in of(state, node):
        if device.serial not in fact.serials:
            continue
        if standing_of(state, device.serial) is not Standing.RETEST:
            continue
        if fact.wrong:
            _judge(
                state,
                device,
                node.id,
                Act.CONVICTED,
                f"preflight: {fact.wrong}",
                proof=Proof.PREFLIGHT,
                actor="preflight",
                by=by,
            )
        else:
            words = f"preflight: {fact.compared} answers were right, which shows no more than that"
            _judge(state, device, node.id, Act.PASSED, words, actor="preflight", by=by)
    admit(state, node)


def _implicated(state: RunState, node: NodeId, ranks: Sequence[Rank]) -> list[Device]:
    """Return the devices of a node that ranks compute on; the machine, if that is not known."""
    known = state.nodes.get(node)
    if known is None:
        return []
    mine = state.ranks_of(node)
    places = {mine.index(rank) for rank in ranks if rank in mine}
    mine_alone = of(state, known)
    used = [d for d in mine_alone if d.local_rank in places]
    return used or [device for device in mine_alone if device.kind == "machine"]


def _judge(  # noqa: PLR0913 - what a verdict says
    state: RunState,
    device: Device,
    node: NodeId,
    act: Act,
    reason: str,
    *,
    proof: Proof = Proof.NONE,
    actor: Actor = "controller",
    by: str = "",
) -> None:
    state.judged_devices += 1
    name = state.run.metadata.name
    # Lives have the same numbers, and may end before their first generation.
    number = f"{state.former_generation}/{state.judged_devices}/{state.now:.6f}"
    order = decide(
        state,
        JudgeDevice,
        reason,
        id=f"{name}/{number}",
        device=device,
        node=node,
        act=act,
        actor=actor,
        by=by or f"the controller of {name}",
        proof=proof,
    )
    state.judging_devices[order.id] = order
    state.unsaid_verdicts.append(order.id)


# What follows ---------------------------------------------------------------------------------


def look(state: RunState, event: Event) -> list[Decision]:
    """Return the orders that are due: verdicts to put on record, nodes to test."""
    if isinstance(event, ControllerStarted):
        # Also of a former life: what it ordered may be lost.
        state.unsaid_verdicts.clear()
        return list(state.judging_devices.values())
    if state.watched and isinstance(event, Telemetry):
        _watch(state)
    return [*_said(state), *_preflights(state)]


def _said(state: RunState) -> Iterator[Decision]:
    found = state.incident
    if found is None and state.incidents and state.incidents[-1].detected_at == state.now:
        found = state.incidents[-1]  # it came up just now, and was over at once
    incident = found.id if found is not None else None
    for name in state.unsaid_verdicts:
        order = msgspec.structs.replace(state.judging_devices[name], incident=incident)
        state.judging_devices[name] = order
        yield order
    state.unsaid_verdicts.clear()


def _preflights(state: RunState) -> Iterator[Decision]:
    if not state.retesting:
        return  # asked at every event, of thousands of nodes
    for name in sorted(state.retesting - state.preflights.keys() - state.seated.keys()):
        node = state.nodes[name]
        if not node.usable:
            continue
        state.preflights[name] = ""
        serials = tuple(
            device.serial
            for device in of(state, node)
            if standing_of(state, device.serial) is Standing.RETEST
        )
        yield decide(
            state,
            PreflightDevices,
            f"{name} is to compute what is known beforehand: {', '.join(serials)} "
            f"{'is' if len(serials) == 1 else 'are'} to be tested",
            node=name,
            serials=serials,
            within_s=PREFLIGHT_S,
        )


def _watch(state: RunState) -> None:
    """Count the steps that watched devices took; clear those that took enough of them."""
    steps = state.reached_step - state.watched_to
    state.watched_to = state.reached_step
    if steps <= 0 or not watching.looks(state.run, state.replicas) or state.diverged:
        return
    for name in state.seated:
        for device in of(state, state.nodes[name]):
            if device.serial not in state.watched:
                continue
            state.watched[device.serial] += steps
            if state.watched[device.serial] >= PROBATION_STEPS:
                del state.watched[device.serial]
                words = f"{PROBATION_STEPS} watched steps with nothing against it"
                _judge(state, device, name, Act.CLEARED, words)
