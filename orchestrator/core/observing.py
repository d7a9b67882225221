"""Takes in what the telemetry of a tick says of ranks, and of the steps that they have done."""

from __future__ import annotations

from statistics import median

from orchestrator.core import vouching
from orchestrator.core.events import Telemetry
from orchestrator.core.phases import Bucket
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Seconds, Step
from orchestrator.protocol.messages import StepReport


def observe(state: RunState, event: Telemetry) -> None:
    """Change the state by what a tick of the present generation says."""
    state.fleet.observe(
        state.now,
        phases=event.phases,
        steps=event.steps,
        progress=event.progress,
        states=event.states,
        cpu_s=event.cpu_s,
    )
    state.fleet.join(event.entered, event.left)
    state.fleet.count(event.groups)
    state.paces.observe(event.steps, event.compute_s, event.work, event.busy_s)
    _wait(state, event)
    vouching.enter(state, event.replayed)
    first = max(state.reached_step, state.start_step) + 1
    if event.reports and event.reports[-1].step >= first:
        due = state.cadence.due(first, event.reports[-1].step)
        state.experience.saved(due, event.stall_s)
    elif event.stall_s > 0:
        state.experience.saved(0, event.stall_s)
    if event.stall_s > 0:
        # Of a long time that is told of at once, not its end: what was done there may be lost yet,
        # and would be counted as a stall instead.
        since = state.now - max(event.watched_s, event.stall_s)
        state.ledger.relabel(
            Seconds(since), Seconds(since + event.stall_s), Bucket.CHECKPOINT_STALL, None
        )
    # Once it is known that they are wrong, those that follow are not what they should be.
    for step, digest in event.digests if not state.diverged else ():
        if state.digests.setdefault(step, digest) != digest:
            state.digests_differ.append(step)
    since_s = event.since_step_s
    ago_s: list[float] = []
    for report in reversed(event.reports):
        ago_s.append(since_s)
        since_s += report.seconds
    _complete(state, event.reports, [Seconds(state.now - since_s) for since_s in reversed(ago_s)])


def _wait(state: RunState, event: Telemetry) -> None:
    """Take in for how long nobody computed in the newest steps, where that is measured."""
    took_s = [each.seconds for each in event.reports if each.step > state.start_step + 1]
    slowest_s = max(event.compute_s, default=0.0)
    if took_s and slowest_s > 0:
        state.ways.take(max(median(took_s) - slowest_s, 0.0))


def _complete(state: RunState, reports: tuple[StepReport, ...], ends: list[Seconds]) -> None:
    """Enter completed steps into the current lineage."""
    # Of a long quiet time there are hundreds of them: their bookkeeping is done once for all.
    losses, log = state.losses, state.step_log
    latest = log[-1][1] if log else Seconds(0.0)
    last: StepReport | None = None
    for report, at in zip(reports, ends, strict=True):
        step = report.step
        if step <= (last.step if last is not None else state.reached_step):
            continue
        last = report
        if step in losses and _bits(losses[step]) != _bits(report.loss):
            state.divergences.append(step)
        losses[step] = report.loss
        state.grad_norms[step] = report.grad_norm
        latest = max(latest, at)
        log.append((step, latest))
        if step > state.start_step + 1:
            # The first step of a generation warms up; it says nothing about the others.
            state.step_times.learn(report.seconds)
    if last is None:
        return
    if state.experience.since is None:
        state.experience.since = latest
    state.reached_step = last.step
    state.tokens_per_s = last.tokens / last.seconds if last.seconds > 0 else 0.0
    if last.step > state.sound_step:
        state.sound_step = last.step
        state.futile_restarts = 0
    if last.step > state.best_step:
        state.best_step = last.step
        _refill(state)


def _bits(value: float | None) -> str:
    return "none" if value is None else float(value).hex()


def _refill(state: RunState) -> None:
    every = state.run.spec.recovery.refill_every_steps
    while state.best_step - state.refilled_at >= every:
        state.refilled_at = Step(state.refilled_at + every)
        for budget in state.budgets.values():
            budget.spent = max(budget.spent - 1, 0)
