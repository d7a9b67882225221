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

from orchestrator.core.copies import newest_safe_step
from orchestrator.core.drains import pressing_at
from orchestrator.core.events import Event, Telemetry, Tick
from orchestrator.core.incident import Cause, Finding
from orchestrator.core.phases import RunPhase
from orchestrator.core.state import Drain, RunState
from orchestrator.policy.switches import PLANNED_SWAP, enabled
from orchestrator.protocol.ids import NodeId, Seconds, Step

KIND = "planned"
STILL_SAVES = 3
"""Memory that has held no newer step for as long as this many saves take is not waited for."""


def leaving(state: RunState) -> tuple[NodeId, ...]:
    """Return the nodes of the world that are to be free, the most urgent first.

    Whatever a restart is for, it takes them along as far as spares allow: it is paid for already.
    """
    if not enabled(state, PLANNED_SWAP):
        return ()
    asked = sorted(state.drains.values(), key=_urgency)
    return tuple(drain.node for drain in asked if drain.node in state.seated)


def _urgency(drain: Drain) -> tuple[float, Seconds, NodeId]:
    return (inf if drain.until is None else drain.until, drain.asked_at, drain.node)


class PlannedSwap:
    """Finds that the moment has come to swap nodes that are to be free for spares.

    As many at a time as there are spares; the others wait for more, and so does a node without any,
    until its time is up. Then it is lost like any other, when it is taken.
    """

    name = PLANNED_SWAP

    def __init__(self) -> None:
        self._held: Step | None = None
        """Which step memory has on two nodes; None while no node waits for a better moment."""
        self._held_at = Seconds(0.0)
        """Since when it has nothing newer, or a node waits."""

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return one finding when the moment has come, for all nodes that can be swapped."""
        nodes = leaving(state) if state.drains and _trains(state) else ()
        if not nodes:
            self._held = None
            return ()
        why = self._good(state)
        if not why and isinstance(event, Telemetry | Tick):
            why = _pressing(state, nodes[0]) or self._still(state)
        if not why:
            return ()
        nodes = nodes[: len(state.spares())]
        # A restart would have to wait for one that may be back at once.
        if not nodes or not state.unfit.isdisjoint(state.seated):
            return ()
        return (_finding(state, nodes, why),)

    def _good(self, state: RunState) -> str:
        """Say why going on from memory loses as little now as it ever will; "" if it does not."""
        # Not one event later, when it is retained: the next one may be a whole save away.
        held = max(state.retained, newest_safe_step(state) or state.retained)
        newer = self._held is not None and held > self._held
        if held != self._held:
            self._held, self._held_at = held, state.now
        newest_commit = max(state.sound_commits, default=Step(-1))
        # A restart now would be one more in a row that brings no new step.
        if held < newest_commit or state.futile_restarts:
            return ""
        if held == state.reached_step and _just_reached(state):
            return f"memory has step {held}, which was just reached"
        # Saves take longer than a step: it will not come any closer than this.
        return f"memory has just come to have step {held}" if newer else ""

    def _still(self, state: RunState) -> str:
        """Say for how long memory has come to hold nothing newer; "" if that is to be expected."""
        step_s = state.step_times.quantile(0.99)
        limit_s = STILL_SAVES * state.run.spec.checkpoint.memory_every_steps * step_s
        limit_s = max(limit_s, state.timeouts.form_s)
        still_s = state.now - self._held_at
        if still_s <= limit_s:
            return ""
        return f"memory has had nothing newer for {still_s:.1f} s, limit {limit_s:.1f} s"


def _trains(state: RunState) -> bool:
    """Whether it is known that the run trains and nothing else is the matter."""
    return (
        state.phase is RunPhase.TRAINING
        and not state.wanting
        and state.incident is None
        and state.reached_step > state.start_step
        # After a controller died: seen by this one, not only by the one before.
        and state.step_log[-1][1] > state.took_over_at
    )


def _just_reached(state: RunState) -> bool:
    """Whether no step can have been made since the last that is known of."""
    return state.now - state.step_log[-1][1] <= state.step_times.quantile(0.5)


def _pressing(state: RunState, node: NodeId) -> str:
    """Say that the time of a node is nearly up; "" if it is not."""
    drain = state.drains[node]
    at = pressing_at(state, drain)
    if at is None or drain.until is None or state.now < at:
        return ""
    left_s = drain.until - state.now
    return f"{left_s:.1f} s are left" if left_s > 0 else f"its time was up {-left_s:.1f} s ago"


def _finding(state: RunState, nodes: tuple[NodeId, ...], why: str) -> Finding:
    asked = "; ".join(f"{node} is to be free, {request(state.drains[node])}" for node in nodes)
    return Finding(
        at=state.now,
        since=state.now,
        kind=KIND,
        cause=Cause.PLANNED,
        nodes=tuple(sorted(nodes)),
        step=state.reached_step,
        evidence=f"{asked}; {why}",
    )


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
