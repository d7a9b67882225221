"""Which nodes are to be free, as they were told to be; how they come to be is a policy's affair.

A drained node stays cordoned until somebody says otherwise, however often its agent starts anew: a
machine that is worked on is rebooted more than once, and to join does not say that it is done.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.core.decisions import Decision, WakeAt
from orchestrator.core.events import DrainRequested
from orchestrator.core.records import Drain
from orchestrator.core.state import RunState, decide
from orchestrator.protocol.ids import NodeId, Seconds


def request(state: RunState, asked: DrainRequested) -> None:
    """Enter that nodes are to be free; of a node that was to be already, the newest word counts."""
    within_s = None if asked.within_s is None else max(asked.within_s - asked.late_s, 0.0)
    for node in asked.nodes:
        before, known = state.drains.get(node), state.nodes.get(node)
        if before is not None and asked.request and before.request == asked.request:
            continue  # taken up once more, after a controller died: its time runs since then
        if before is not None:
            incarnation = before.incarnation
        else:
            incarnation = 0 if known is None else known.incarnation
        state.drains[node] = Drain(
            node=node,
            asked_at=state.now,
            by=asked.by,
            reason=asked.reason,
            until=None if within_s is None else Seconds(state.now + within_s),
            incarnation=incarnation,
            request=asked.request,
        )


def cancel(state: RunState, nodes: Iterable[NodeId]) -> None:
    """Enter that nodes may be used again."""
    for node in nodes:
        state.drains.pop(node, None)


def pressing_at(state: RunState, drain: Drain) -> Seconds | None:
    """Return from when on the time of a node is nearly up; None if nobody said when it is."""
    # A swap takes several phases, each of which is given at least this long.
    return None if drain.until is None else Seconds(drain.until - state.timeouts.form_s)


def wake(state: RunState) -> list[Decision]:
    """Ask to be woken when the time of a node of the world is nearly up."""
    pressing = {node: pressing_at(state, state.drains[node]) for node in sorted(state.drains)}
    return [
        decide(
            state, WakeAt, f"the time of {node} is nearly up then", at=Seconds(max(at, state.now))
        )
        for node, at in pressing.items()
        if at is not None and node in state.seated
    ]
