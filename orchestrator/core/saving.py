"""What becomes of saved state: committed when it is whole, let go when something newer is safe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter

from orchestrator.core import copies
from orchestrator.core.decisions import CommitCheckpoint, Decision, RetainMemory
from orchestrator.core.experience import latency_s
from orchestrator.core.state import RunState, decide
from orchestrator.core.trust import trusted
from orchestrator.protocol.ids import Step
from orchestrator.protocol.messages import Receipt, ShardsWritten

_shard = attrgetter("shard")


def save(state: RunState) -> list[Decision]:
    """Commit what is wholly written; release what memory no longer needs."""
    decisions: list[Decision] = []
    newest = max(state.sound_commits, default=Step(0)) if state.commit_at else Step(0)
    for step in [step for step in state.commit_at if step < newest]:
        # It failed, and what it was for is served better by now.
        del state.commit_at[step]
        state.written.pop(step, None)
    for step in [s for s in state.written if not trusted(state.onsets, s, state.generation)]:
        del state.written[step]
    for step in sorted(state.written):
        due = state.now >= state.commit_at.get(step, state.now)
        if due and step not in state.committing and _written_whole(state, step):
            state.committing[step] = state.generation
            # Else it would be taken for one that failed, once something newer is committed.
            state.commit_at.pop(step, None)
            decisions.append(commit_decision(state, step))
    safe = copies.newest_safe_step(state)
    if safe is not None and safe > state.retained and not state.wanting:
        state.retained = safe
        copy_s = latency_s(state.step_log, safe, state.now)
        if copy_s is not None:
            state.experience.copy_s.append(copy_s)
        state.holdings.drop(step for step in state.holdings if step < safe)
        words = f"step {safe} is held by every node"
        decisions.append(decide(state, RetainMemory, words, step=safe))
    return decisions


def commit_decision(state: RunState, step: Step) -> CommitCheckpoint:
    """Return the order to commit a step that is being committed."""
    reports = state.written[step]
    receipts = sorted(_receipts(reports.values()), key=_shard)
    return CommitCheckpoint(
        # The epoch of a commit is the generation that wrote its shards.
        generation=state.committing[step],
        step=step,
        receipts=tuple(receipts),
        model=next(report.model for _, report in sorted(reports.items())),
        reason=f"all {len(receipts)} shards of step {step} are written",
    )


def _written_whole(state: RunState, step: Step) -> bool:
    """Whether every shard of a step has been written in the current generation."""
    reports = state.written.get(step, {})
    # Asked for at every event, of thousands of receipts: nearly always some are still missing.
    if sum(len(report.receipts) for report in reports.values()) < state.shard_count():
        return False
    return len(set(map(_shard, _receipts(reports.values())))) == state.shard_count()


def _receipts(reports: Iterable[ShardsWritten]) -> Iterator[Receipt]:
    return chain.from_iterable(report.receipts for report in reports)
