"""When a node that is to be free is swapped for a spare: at the moment that costs least.

Maintenance is announced, and so is much of preemption. A restart that can choose its moment loses
next to nothing: right after memory came to hold a step on two nodes, hardly a step was made since.
A node that is merely lost costs its detection and half the time between two saves in addition.

This is a detector in form, since what it finds is an incident like others, with a cost in the
ledger; in substance it is a policy, and `leaving` is what others of them need to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from orchestrator.core.drains import pressing_at
from orchestrator.core.events import Event, Telemetry, Tick
from orchestrator.core.incident import Cause, Finding
from orchestrator.core.records import Drain
from orchestrator.core.state import RunState
from orchestrator.policy import networks, stragglers
from orchestrator.policy.moments import Moment, trains
from orchestrator.policy.switches import PLANNED_SWAP, enabled
from orchestrator.protocol.ids import NodeId, Seconds

KIND = "planned"


def leaving(state: RunState) -> tuple[NodeId, ...]:
    """Return the nodes of the world that are to be free, the most urgent first.

    Whatever a restart is for, it takes them along as far as spares allow: it is paid for already.
    """
    if not enabled(state, PLANNED_SWAP):
        return ()
    asked = sorted(state.drains.values(), key=_urgency)
    named = [drain.node for drain in asked if drain.node in state.seated]
    slow = (*stragglers.leaving(state), *networks.leaving(state))
    return tuple(dict.fromkeys([*named, *slow]))


def _urgency(drain: Drain) -> tuple[float, Seconds, NodeId]:
    return (inf if drain.until is None else drain.until, drain.asked_at, drain.node)


class PlannedSwap:
    """Finds that the moment has come to swap nodes that are to be free for spares.

    As many at a time as there are spares; the others wait for more, and so does a node without any,
    until its time is up. Then it is lost like any other, when it is taken.
    """

    name = PLANNED_SWAP

    def __init__(self) -> None:
        self._moment = Moment()

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return one finding when the moment has come, for all nodes that can be swapped."""
        # Nobody begins anew for what was measured before the world began, until that shows again.
        known = stragglers.surely(state)
        networks_now = networks.leaving(state)
        wanted = state.drains or (state.slow and known) or networks_now
        nodes = leaving(state) if wanted and trains(state) else ()
        sure = {*state.drains, *networks_now}
        nodes = tuple(node for node in nodes if known or node in sure)
        if not nodes:
            self._moment.forget()
            return ()
        why = self._moment.good(state)
        if not why and isinstance(event, Telemetry | Tick):
            why = _pressing(state, nodes[0]) or self._moment.still(state)
        if not why:
            return ()
        nodes = nodes[: len(state.spares())]
        # A restart would have to wait for one that may be back at once.
        if not nodes or not state.unfit.isdisjoint(state.seated):
            return ()
        return (_finding(state, nodes, why),)


def _pressing(state: RunState, node: NodeId) -> str:
    """Say that the time of a node is nearly up; "" if it is not."""
    drain = state.drains.get(node)
    at = pressing_at(state, drain) if drain is not None else None
    if drain is None or at is None or drain.until is None or state.now < at:
        return ""
    left_s = drain.until - state.now
    return f"{left_s:.1f} s are left" if left_s > 0 else f"its time was up {-left_s:.1f} s ago"


def _finding(state: RunState, nodes: tuple[NodeId, ...], why: str) -> Finding:
    asked = "; ".join(_why(state, node) for node in nodes)
    return Finding(
        at=state.now,
        since=state.now,
        kind=KIND,
        cause=Cause.PLANNED,
        nodes=tuple(sorted(nodes)),
        step=state.reached_step,
        evidence=f"{asked}; {why}",
    )


def _why(state: RunState, node: NodeId) -> str:
    if node in state.drains:
        return f"{node} is to be free, {request(state.drains[node])}"
    if node in networks.leaving(state):
        return networks.reason(state, node)
    return stragglers.reason(state, node)


def request(drain: Drain) -> str:
    """Return who asked for a drain, and why, in words."""
    return f"asked for by {drain.by}" + (f": {drain.reason}" if drain.reason else "")


def standing(state: RunState, node: NodeId) -> str:
    """Return how far a drain has come, in words; "" for a node that is not cordoned."""
    drain = state.drains.get(node)
    if drain is None:
        return ""
    if state.drained(node):
        return f"cordoned, {request(drain)}"
    words = f"to be free, {request(drain)}"
    if not enabled(state, PLANNED_SWAP):
        return f"{words}; spec.recovery.disable has {PLANNED_SWAP}, so it stays until it is lost"
    late = drain.until is not None and state.now >= drain.until
    if leaving(state).index(node) < len(state.spares()):
        return f"{words}; waiting for the next step in memory"
    if late:
        return f"{words}; no spare came in time: it stays until it is lost, or a spare comes"
    return f"{words}; waiting for a spare: {len(state.spares())} free"
