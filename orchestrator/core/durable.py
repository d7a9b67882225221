"""What the durable tier answers: what a search of it found, what was committed, what failed."""

from __future__ import annotations

from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CheckpointJudged,
    CommitFailed,
    SearchFailed,
)
from orchestrator.core.experience import latency_s
from orchestrator.core.records import Committed
from orchestrator.core.state import RunState
from orchestrator.core.trust import trusted
from orchestrator.protocol.ids import NodeId, Seconds, Step
from orchestrator.protocol.messages import ShardsStaged

SEARCH_AGAIN_S, SEARCH_AGAIN_MAX_S = 1.0, 15.0
"""A search that got no answer is repeated after this, each time after twice as long."""
COMMIT_AGAIN_S = 2.0
"""A commit that failed, and may succeed later, is tried again after this, while none is newer."""


def answers(state: RunState, event: CheckpointFound | SearchFailed) -> bool:
    """Whether an event answers the search that is under way, as far as it says."""
    if isinstance(event, CheckpointFound) and event.step is not None:
        assert event.epoch is not None, "a checkpoint has one"
        if not trusted(state.onsets, event.step, event.epoch):
            return False  # who searched did not know yet
    if event.number:
        return event.number == state.searches and state.asked_at is not None
    return not 0 < event.generation < state.generation


def find(state: RunState, found: CheckpointFound) -> None:
    """Take over what the durable tier has and the journal does not know, and what it rejected."""
    state.found = found
    if state.incident is not None:
        searched = state.incident.reads
        searched["searching"] = searched.get("searching", 0) + found.reads
    for text in found.rejected:
        state.save_failures.append((state.now, Step(0), f"passed over: {text}"))
    if found.step is not None and all(known.key != found.key for known in state.commits):
        assert found.epoch is not None
        state.know_commits([Committed(found.step, found.epoch, found.key, state.now)])
    if found.grade is not None:
        for known in (known for known in state.commits if known.key == found.key):
            known.verdicts.add(found.grade)
    for known in state.commits:
        # What was committed while it searched, it may not have seen.
        unseen = state.asked_at is not None and known.at >= state.asked_at
        # One that is not trusted was passed over for that, readable or not.
        good = trusted(state.onsets, known.step, known.epoch)
        # So was one with a lesser grade than was asked for, unread.
        good = good and (found.grade is None or found.grade in known.verdicts)
        if good and not unseen and (found.step is None or known.step > found.step):
            known.rejected = known.rejected or "unreadable when it was needed"
    state.judge_commits()
    state.asked_at, state.search_failure, state.search_failures = None, "", 0


def fail_search(state: RunState, reason: str, *, again: bool) -> None:
    """Enter that a search got no answer, and when to search again, if that can help."""
    pause_s = min(SEARCH_AGAIN_S * 2**state.search_failures, SEARCH_AGAIN_MAX_S)
    state.search_failures = min(state.search_failures + 1, 10)
    state.asked_at, state.search_failure = None, reason
    state.search_again_at = Seconds(state.now + pause_s) if again else None


def give_up_search(state: RunState) -> None:
    """Take a search for failed that has had longer than anything may stand still."""
    limit_s = state.timeouts.warmup_s
    if state.asked_at is not None and state.now - state.asked_at > limit_s:
        fail_search(state, f"no answer within {limit_s:g} s", again=True)


def commit(state: RunState, done: CheckpointCommitted) -> None:
    """Enter a checkpoint that exists now."""
    state.committing.pop(done.step, None)
    reports = state.written.pop(done.step, {}).values()
    seen = {each.shard: each for report in reports for each in report.impressions}
    # Of a checkpoint that came late it is not known any more; then the next one has none before it.
    state.vouched = (done.step, seen) if seen else None
    state.votes = {step: votes for step, votes in state.votes.items() if step >= done.step}
    state.commit_at.pop(done.step, None)
    if all(known.key != done.key for known in state.commits):
        write_s = latency_s(state.step_log, done.step, state.now)
        if write_s is not None and done.epoch == state.generation:
            state.experience.write_s.append(write_s)
        state.know_commits([Committed(done.step, done.epoch, done.key, state.now)])


def take_votes(state: RunState, node: NodeId, staged: ShardsStaged) -> None:
    """Enter what replicas have of shards that others write."""
    if state.vouched is not None and staged.step < state.vouched[0]:
        return
    by_shard = state.votes.setdefault(staged.step, {})
    for seen in staged.impressions:
        by_shard.setdefault(seen.shard, {})[node] = seen.content


def judge(state: RunState, judged: CheckpointJudged) -> None:
    """Enter a verdict that is on record."""
    state.judging.pop((judged.step, judged.epoch, judged.verdict), None)
    for known in state.commits:
        if (known.step, known.epoch) == (judged.step, judged.epoch):
            known.verdicts.add(judged.verdict)
            if not judged.verdict.good:
                known.rejected = known.rejected or f"{judged.verdict}: {judged.reason}"
    if not judged.verdict.good:
        state.save_failures.append((state.now, judged.step, f"barred: {judged.reason}"))
        state.judge_commits()


def fail_commit(state: RunState, failed: CommitFailed) -> None:
    """Enter that a checkpoint was not committed, and when to try again, if that can help."""
    state.save_failures.append((state.now, failed.step, failed.reason))
    if state.committing.get(failed.step) != failed.epoch:
        return
    del state.committing[failed.step]
    if failed.again:
        state.commit_at[failed.step] = Seconds(state.now + COMMIT_AGAIN_S)
    else:
        state.written.pop(failed.step, None)


def pass_over(state: RunState, step: Step, reason: str) -> None:
    """Strike off a checkpoint that could not be read when it was needed."""
    for known in state.commits:
        if known.step == step:
            known.rejected = reason
    state.judge_commits()
