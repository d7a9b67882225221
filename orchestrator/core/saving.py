"""What becomes of saved state: committed when it is whole, let go when something newer is safe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter

from orchestrator.core import copies, plausible
from orchestrator.core.decisions import (
    AbandonCheckpoint,
    CommitCheckpoint,
    Decision,
    JudgeCheckpoint,
    RetainMemory,
)
from orchestrator.core.experience import latency_s
from orchestrator.core.records import Committed
from orchestrator.core.state import RunState, decide
from orchestrator.core.trust import Verdict, trusted
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
            doubts = plausible.doubts(state, step)
            if doubts:
                decisions.append(_abandon(state, step, doubts))
                continue
            state.committing[step] = state.generation
            # Else it would be taken for one that failed, once something newer is committed.
            state.commit_at.pop(step, None)
            decisions.append(commit_decision(state, step))
    decisions += _judge(state)
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


def _abandon(state: RunState, step: Step, doubts: list[str]) -> AbandonCheckpoint:
    """Let a step go that can not be committed; its shards are collected with the next one's."""
    del state.written[step]
    state.votes.pop(step, None)
    state.save_failures += [(state.now, step, f"not committed: {doubt}") for doubt in doubts]
    words = f"step {step} is not committed: {'; '.join(doubts)}"
    return decide(state, AbandonCheckpoint, words, step=step, doubts=tuple(doubts))


def _judge(state: RunState) -> list[Decision]:
    """Have it put on record what replicas say of the newest checkpoint, once it is known."""
    if state.vouched is None or state.vouched[0] not in state.votes:
        return []
    step = state.vouched[0]
    verdict, words = Verdict.SUSPECT, plausible.dissent(state, step)
    if not words:
        verdict, words = Verdict.STATE_VERIFIED, plausible.unanimous(state, step)
    known = next((c for c in reversed(state.commits) if c.step == step), None)
    if not words or known is None:
        return []
    del state.votes[step]
    state.replicas_agreed = state.replicas_agreed or verdict.good
    return [judge(state, known, verdict, words)]


def judge(state: RunState, known: Committed, verdict: Verdict, reason: str) -> JudgeCheckpoint:
    """Return the order to put a verdict on record about a checkpoint that exists.

    Until it is on record, a controller that takes over gives the order again.
    """
    state.judging[known.step, known.epoch, verdict] = reason
    return decide(
        state, JudgeCheckpoint, reason, step=known.step, epoch=known.epoch, verdict=verdict
    )


def judge_again(state: RunState) -> list[Decision]:
    """Return the orders of verdicts that are not on record, which may be lost."""
    return [
        decide(state, JudgeCheckpoint, reason, step=step, epoch=epoch, verdict=verdict)
        for (step, epoch, verdict), reason in state.judging.items()
    ]


def commit_again(state: RunState) -> list[Decision]:
    """Return the orders of commits that have no answer, which may be lost.

    What was found to be corrupt meanwhile is not ordered again: nothing that it was to be made of
    is remembered. If it was committed all the same, who looks for checkpoints does not trust it.
    """
    for step in state.committing.keys() - state.written.keys():
        del state.committing[step]
    return [commit_decision(state, step) for step in sorted(state.committing)]


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
