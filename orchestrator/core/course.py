"""The course of a run: from phase to phase, as far as its nodes have come, and to its end."""

from __future__ import annotations

from orchestrator.core import patience
from orchestrator.core.decisions import Decision, EndRun
from orchestrator.core.incident import Note
from orchestrator.core.marks import world_mark
from orchestrator.core.phases import PHASE_OF_MARK, RunPhase, require
from orchestrator.core.state import PHASES_MAX, RunState, decide
from orchestrator.core.trust import trusted
from orchestrator.protocol.ids import Step
from orchestrator.protocol.messages import MARKS

_MARK_STEPPED = MARKS.index("stepped")
_MARK_FINISHED = MARKS.index("finished")


def enter(state: RunState, phase: RunPhase, *, whole: bool = False) -> None:
    """Go on to a phase; say whether the one before came to its end."""
    patience.learn(state, whole=whole)
    state.phase = require(state.phase, phase)
    state.phase_since, state.unseen_s = state.now, 0.0
    if state.phases and state.phases[-1][0] == state.now:
        state.phases.pop()
    state.phases.append((state.now, phase))
    del state.phases[:-PHASES_MAX]


def advance(state: RunState) -> None:
    """Follow the marks: the least advanced node of the world says where the run is."""
    if state.wanting or not state.seats:
        return
    mark = world_mark(state)
    phase = PHASE_OF_MARK[mark]
    order = list(PHASE_OF_MARK)
    if state.phase in order and order.index(phase) > order.index(state.phase):
        whole = True
        for passed in order[order.index(state.phase) + 1 : order.index(phase) + 1]:
            if not (passed is RunPhase.TRAINING and mark == _MARK_FINISHED):
                enter(state, passed, whole=whole)
                whole = False  # of one that is passed over, nobody saw how long it took
    if mark >= _MARK_STEPPED:
        for incident in state.open_incidents():
            incident.resumed_at = state.now
            cost = state.now - incident.since
            incident.timeline.append(
                Note(at=state.now, text=f"training again, {cost:.2f} s after it began")
            )


def complete(state: RunState) -> bool:
    """Whether every rank is done and what they came to is durable, whoever was lost since."""
    last = Step(state.run.spec.trainer.steps)
    return 0 < len(state.seats) == len(state.lanes) and state.committed(last)


def succeed(state: RunState) -> list[Decision]:
    """End a run that is complete."""
    last = state.run.spec.trainer.steps
    return end(state, "Succeeded", f"all {last} steps are done and step {last} is committed")


def concluding(state: RunState) -> bool:
    """Whether nothing is missing but the answer to the last commit, and that may still come.

    Nodes that are lost meanwhile are not needed any more.
    """
    last = Step(state.run.spec.trainer.steps)
    patient = state.now - state.phase_since <= state.timeouts.save_s
    return (
        state.phase is RunPhase.FINISHING
        and last in state.committing
        and patient
        and trusted(state.onsets, last, state.committing[last])
    )


def finish(state: RunState) -> list[Decision]:
    """End a run whose last checkpoint does not become durable in time."""
    last = Step(state.run.spec.trainer.steps)
    spent_s = state.now - state.phase_since
    limit_s = state.timeouts.save_s
    if last in state.committing:
        # Its shards are there already; what is left is one small record.
        limit_s *= 2
        why = "its commit was ordered and has no answer"
    else:
        failed = [reason for _, step, reason in state.save_failures if step == last]
        why = failed[-1] if failed else "no node has said that it wrote its part"
    if spent_s <= limit_s:
        return []
    return end(
        state,
        "Failed",
        f"all {last} steps are done, but their checkpoint is not durable after "
        f"{limit_s:.0f} s: {why}",
    )


def end(state: RunState, how: str, reason: str) -> list[Decision]:
    """End the run: Succeeded, Failed or Stopped."""
    state.end_state, state.end_reason = how, reason
    final = {"Succeeded": RunPhase.SUCCEEDED, "Failed": RunPhase.FAILED}
    for incident in state.open_incidents():
        if incident.decided_at is None:
            incident.decided_at = state.now
        incident.rung = incident.rung or "stop"
        incident.reason = reason
        incident.timeline.append(Note(at=state.now, text=f"stopped: {reason}"))
    enter(state, final.get(how, RunPhase.STOPPED))
    return [decide(state, EndRun, reason, state=how)]
