"""A state whose bytes are those that were staged, and which still can not be one."""

from typing import Any

import msgspec
import pytest

from orchestrator.core.decisions import (
    AbandonCheckpoint,
    CommitCheckpoint,
    Decision,
    JudgeCheckpoint,
)
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointJudged,
    ControllerStarted,
)
from orchestrator.core.trust import Verdict
from orchestrator.protocol.ids import NodeId, Step
from orchestrator.protocol.messages import Impression, Receipt, ShardsStaged, ShardsWritten
from tests.conftest import Cluster


@pytest.fixture
def cluster() -> Cluster:
    """Return two replicas of two shards each; node-0 has those that are written."""
    cluster = Cluster()
    cluster.start()
    return cluster


def seen(shard: int, step: int, **changes: Any) -> Impression:
    usual = Impression(
        shard=shard,
        boxes=f"boxes {shard}",
        content=f"content {shard} {step}",
        moving=f"moving {shard} {step}",
        extra=f"extra {step}",
        rms=0.02,
    )
    return msgspec.structs.replace(usual, **changes)


def written(cluster: Cluster, step: int, *changes: dict[str, Any]) -> list[Decision]:
    """Have both shards of a step be written, but for what is given of each."""
    changed = [*changes, {}, {}]
    fact = ShardsWritten(
        generation=cluster.state.generation,
        step=Step(step),
        receipts=tuple(Receipt(shard, 1000, f"{shard:064x}") for shard in range(2)),
        model="m",
        impressions=tuple(seen(shard, step, **changed[shard]) for shard in range(2)),
    )
    return cluster.after(0.1).say("node-0", fact)


def staged(cluster: Cluster, step: int, **changes: Any) -> list[Decision]:
    """Have the other replica say what it has."""
    fact = ShardsStaged(
        generation=cluster.state.generation,
        step=Step(step),
        impressions=(seen(0, step), seen(1, step, **changes)),
    )
    return cluster.after(0.1).say("node-1", fact)


def committed(cluster: Cluster, step: int) -> list[Decision]:
    done = CheckpointCommitted(
        at=cluster.at(), step=Step(step), epoch=cluster.state.generation, key=f"commits/{step}"
    )
    return cluster.tell(done)


def saved(cluster: Cluster, step: int, *, votes: bool = True) -> list[Decision]:
    """Have a step be saved as it should be; return what is decided at the end."""
    if votes:
        staged(cluster, step)
    written(cluster, step)
    return committed(cluster, step)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra": "extra 10"}, "torn: shard 1 has counters extra 10, expected extra 20 as 1 of 2"),
        ({"bad": ("param/w",)}, "not finite: expected numbers, found others in param/w of shard 1"),
        (
            {"moving": "moving 1 10"},
            "stale: the optimizer's chunks of shard 1 are those of step 10",
        ),
        ({"boxes": "fewer"}, "layout: shard 1 has boxes fewer, expected boxes 1 as in step 10"),
        (
            {"gap": 5},
            "found some missing or twice; not whole by itself: shard 1",
        ),
        ({"rms": 2.1}, "out of proportion: weights of shard 1 are 2.1 on average, expected about"),
        ({"rms": 1e-5}, "out of proportion: weights of shard 1 are 1e-05 on average"),
    ],
)
def test_what_can_not_be_a_state_is_not_committed_and_named_and_training_goes_on(
    cluster: Cluster, changes: dict[str, Any], words: str
) -> None:
    saved(cluster, 10)

    decisions = written(cluster, 20, {}, changes)

    (abandoned,) = decisions
    assert isinstance(abandoned, AbandonCheckpoint)
    assert words in abandoned.reason
    assert abandoned.doubts
    state = cluster.state
    assert [(step, words in why) for _, step, why in state.save_failures] == [(20, True)]
    assert not state.wanting
    assert state.incidents == []
    assert [c.step for c in state.commits] == [10]
    assert any(isinstance(d, CommitCheckpoint) for d in written(cluster, 30))


def test_what_is_sound_is_committed_and_what_agents_do_not_say_is_not_doubted(
    cluster: Cluster,
) -> None:
    for step in (10, 20):
        saved(cluster, step)
    silent = ShardsWritten(
        generation=cluster.state.generation,
        step=Step(30),
        receipts=tuple(Receipt(shard, 1000, f"{shard:064x}") for shard in range(2)),
        model="m",
    )

    (commit,) = cluster.say("node-0", silent)

    assert isinstance(commit, CommitCheckpoint)
    assert cluster.state.save_failures == []


def test_what_was_never_updated_is_not_stale(cluster: Cluster) -> None:
    written(cluster, 10, {"moving": ""})
    committed(cluster, 10)

    assert any(isinstance(d, CommitCheckpoint) for d in written(cluster, 20, {"moving": ""}))


def test_replicas_that_agree_verify_a_state_and_it_is_on_record(cluster: Cluster) -> None:
    (judge,) = saved(cluster, 10)

    assert isinstance(judge, JudgeCheckpoint)
    assert (judge.step, judge.epoch, judge.verdict) == (10, 1, Verdict.STATE_VERIFIED)
    assert judge.reason == "2 replicas have the same bytes of all 2 shards"
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=2))
    assert judge in cluster.decisions[-4:]
    cluster.tell(
        CheckpointJudged(
            at=cluster.at(), step=judge.step, epoch=judge.epoch, verdict=judge.verdict, reason="x"
        )
    )
    (known,) = cluster.state.commits
    assert known.verdicts == {Verdict.STATE_VERIFIED}
    assert cluster.state.judging == {}
    assert not known.rejected


def test_a_replica_that_speaks_late_is_heard(cluster: Cluster) -> None:
    assert saved(cluster, 10, votes=False) == []

    (judge,) = staged(cluster, 10)

    assert isinstance(judge, JudgeCheckpoint)


def test_a_replica_that_has_other_bytes_keeps_a_state_from_being_committed(
    cluster: Cluster,
) -> None:
    saved(cluster, 10)
    staged(cluster, 20, content="other")

    (abandoned,) = written(cluster, 20)

    assert isinstance(abandoned, AbandonCheckpoint)
    assert "shard 1 is xxh3-128 content 1 20 as written, other on node-1" in abandoned.reason


def test_a_replica_that_says_so_late_bars_what_was_committed(cluster: Cluster) -> None:
    saved(cluster, 10)
    saved(cluster, 20, votes=False)

    (judge,) = staged(cluster, 20, content="other")

    assert isinstance(judge, JudgeCheckpoint)
    assert judge.verdict is Verdict.SUSPECT
    cluster.tell(
        CheckpointJudged(
            at=cluster.at(),
            step=judge.step,
            epoch=judge.epoch,
            verdict=judge.verdict,
            reason=judge.reason,
        )
    )
    assert cluster.state.sound_commits == {10}
    assert "suspect: replicas differ: shard 1" in cluster.state.commits[-1].rejected


def test_replicas_that_never_agreed_are_not_held_to_it(cluster: Cluster) -> None:
    staged(cluster, 10, content="its own")
    written(cluster, 10)

    assert committed(cluster, 10) == []
    assert cluster.state.sound_commits == {10}


def test_damage_that_a_scrub_finds_bars_the_checkpoint_and_is_told(cluster: Cluster) -> None:
    saved(cluster, 10)
    saved(cluster, 20)

    cluster.tell(
        CheckpointJudged(
            at=cluster.at(),
            step=Step(20),
            epoch=cluster.state.generation,
            verdict=Verdict.SUSPECT,
            reason="scrub found expected xxh3-128 a, found xxh3-128 b: w of gen/s0.st",
        )
    )

    assert cluster.state.sound_commits == {10}
    ((_, step, why),) = cluster.state.save_failures
    assert (step, why[:28]) == (20, "barred: scrub found expected")
    assert NodeId("node-0") in cluster.state.nodes
