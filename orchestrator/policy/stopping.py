"""When to give up: the job itself is at fault, or it has been brought back too often."""

from __future__ import annotations

from orchestrator.core.incident import BUDGET_OF
from orchestrator.core.plans import End, Pause, Plan
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Seconds
from orchestrator.protocol.runfile import seconds

SAME_NODE_REPEATS_MAX = 3
"""The same fault at the same step on one node this often ends the run: there was no other node
to try it on, and burning the rest of the budget would show nothing new."""


def stop_misconfigured(state: RunState) -> Plan | None:
    """End a run whose job can not run as written; starting it again can not help."""
    incident = state.incident
    if incident is None or incident.kind != "misconfigured":
        return None
    finding = next(f for f in incident.findings if f.kind == "misconfigured")
    return End(state="Failed", reason=finding.evidence)


def stop_poison(state: RunState) -> Plan | None:
    """End a run that fails in the same way at the same step wherever it is put."""
    for fault in state.occurrences.values():
        times = len(fault.generations)
        if times < 2:
            continue
        if len(fault.nodes) > 1 or times >= SAME_NODE_REPEATS_MAX:
            return End(
                state="Failed",
                reason=f"software fault: {fault.signature} after step {fault.step} in "
                f"{times} generations on {', '.join(sorted(fault.nodes))}; "
                "the fault moves with the job, not with a node" + _traceback(state),
            )
    return None


def stop_budget(state: RunState) -> Plan | None:
    """End a run that spent its restarts for faults of this origin."""
    if state.incident is None:
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
    """Pause before a restart if the very same fault has come back; longer each time."""
    incident = state.incident
    if incident is None or not state.occurrences:
        return None
    if not any(finding.signature for finding in incident.findings):
        return None
    latest = next(reversed(state.occurrences.values()))
    repeats = len(latest.generations)
    if repeats < 2:
        return None
    recovery = state.run.spec.recovery
    first, longest = seconds(recovery.backoff), seconds(recovery.backoff_max)
    pause_s = min(first * 2 ** (repeats - 2), longest)
    until = state.pause_until
    if until is None:
        until = Seconds(state.now + pause_s)
    if state.now >= until:
        return None
    return Pause(
        until=until,
        reason=f"{latest.signature} came back ({repeats} times); "
        f"pausing {pause_s:g} s before the restart",
    )


def _traceback(state: RunState) -> str:
    for incident in reversed(state.incidents):
        for finding in incident.findings:
            if finding.detail and finding.signature:
                return f"\n{finding.detail.rstrip()}"
    return ""
