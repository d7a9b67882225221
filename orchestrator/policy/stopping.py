"""When to give up: the job itself is at fault, or it has been brought back too often."""

from __future__ import annotations

from orchestrator.core.incident import BUDGET_OF, Cause
from orchestrator.core.plans import End, Pause, Plan
from orchestrator.core.records import Occurrence
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Seconds
from orchestrator.protocol.runfile import seconds

SAME_NODE_REPEATS_MAX = 3
"""The same fault at the same step on one node this often ends the run: there was no other node
to try it on, and burning the rest of the budget would show nothing new."""
_MOVED = "the fault moves with the job, not with a node"
_NOWHERE_TO_MOVE = "no other node was free to try it on"
_DOUBLINGS_MAX = 100
"""More than any pause can be doubled before it reaches the longest that a run file can say."""


def stop_misconfigured(state: RunState) -> Plan | None:
    """End a run whose job can not run as written; starting it again can not help."""
    incident = state.incident
    if incident is None or incident.kind != "misconfigured":
        return None
    finding = next(f for f in incident.findings if f.kind == "misconfigured")
    return End(state="Failed", reason=finding.evidence)


BARE_REPEATS = 3
"""A signal of which nobody knows where in the program it struck is a bug from so many times on."""


def _is_bare(fault: Occurrence) -> bool:
    """Whether all that is known of a fault is the signal that ended a rank (detect.exits)."""
    return fault.signature.startswith("exit -") and " at " not in fault.signature


def stop_poison(state: RunState) -> Plan | None:
    """End a run that fails in the same way at the same step wherever it is put."""
    for fault in state.occurrences.values():
        times = len(fault.generations)
        if times < 2:
            continue
        # Of months, one has two GPUs that fail in the same step, and abort their ranks alike.
        moved = len(fault.nodes) > 1 and times >= (BARE_REPEATS if _is_bare(fault) else 2)
        if moved or times >= SAME_NODE_REPEATS_MAX:
            return End(
                state="Failed",
                reason=f"software fault: {fault.signature} after step {fault.step} in "
                f"{times} generations on {', '.join(sorted(fault.nodes))}; "
                + (_MOVED if moved else _NOWHERE_TO_MOVE)
                + _traceback(state),
            )
    return None


def stop_budget(state: RunState) -> Plan | None:
    """End a run that spent its restarts for faults of this origin."""
    if state.incident is None or state.incident.cause not in BUDGET_OF:
        return None
    origin = BUDGET_OF[state.incident.cause]
    budget = state.budgets[origin]
    if budget.left > 0:
        return None
    return End(
        state="Failed",
        reason=f"{origin} budget spent: {budget.spent} restarts, limit {budget.limit}, refilled "
        f"by one every {state.run.spec.recovery.refill_every_steps} new steps; "
        f"last: {state.incident.findings[-1].evidence}" + _traceback(state),
    )


def back_off(state: RunState) -> Plan | None:
    """Pause before a restart if those before it brought no new step; twice as long each time.

    Whatever it is that came back: to restart at once has been tried, and a cause from outside,
    such as memory that is short for a while, needs time to pass. The first restart is at once.
    """
    futile = state.futile_restarts
    if state.incident is None or futile == 0 or state.incident.cause is Cause.PLANNED:
        return None
    recovery = state.run.spec.recovery
    first_s, longest_s = seconds(recovery.backoff), seconds(recovery.backoff_max)
    pause_s = min(first_s * 2.0 ** min(futile - 1, _DOUBLINGS_MAX), longest_s)
    until = state.pause_until
    if until is None:
        until = Seconds(state.now + pause_s)
    if state.now >= until:
        return None
    times = "the restart before" if futile == 1 else f"{futile} restarts in a row"
    return Pause(
        until=until,
        reason=f"{times} brought no new step; pausing {pause_s:g} s before the next one",
    )


def _traceback(state: RunState) -> str:
    for incident in reversed(state.incidents):
        for finding in incident.findings:
            if finding.detail and finding.signature:
                return f"\n{finding.detail.rstrip()}"
    return ""
