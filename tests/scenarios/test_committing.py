"""When a checkpoint is committed, and when a commit that failed is tried again."""

from typing import Any

import pytest

from orchestrator.core.decisions import CommitCheckpoint
from orchestrator.core.events import CheckpointCommitted, CommitFailed, ControllerStarted
from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import Receipt, ShardsWritten


def test_a_checkpoint_is_committed_once_when_every_shard_is_written(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)

    def write(node: str, shards: tuple[int, ...]) -> list[Any]:
        receipts = tuple(Receipt(shard, 10, "d") for shard in shards)
        fact = ShardsWritten(generation=Generation(1), step=Step(5), receipts=receipts, model="m")
        return cluster.say(node, fact)

    assert write("node-0", (0,)) == []
    (commit,) = write("node-1", (1,))
    assert (commit.step, commit.generation) == (5, 1)
    assert write("node-1", (1,)) == []


def written(cluster: Any, step: int) -> list[Any]:
    """Both shards of a step are written; returns what is ordered then."""
    for node, shard in (("node-0", 0), ("node-1", 1)):
        fact = ShardsWritten(
            generation=cluster.state.generation,
            step=Step(step),
            receipts=(Receipt(shard, 10, "d"),),
            model="m",
        )
        decisions = cluster.say(node, fact)
    return decisions


def commits(decisions: list[Any]) -> list[int]:
    return [d.step for d in decisions if isinstance(d, CommitCheckpoint)]


@pytest.mark.parametrize(("again", "expected"), [(True, [5]), (False, [])])
def test_a_commit_that_failed_for_a_while_is_tried_again_and_one_that_never_can_is_not(
    cluster: Any,
    expected: list[int],
    *,
    again: bool,
) -> None:
    cluster.start()
    cluster.train(5)
    assert commits(written(cluster, 5)) == [5]

    failure = {"step": Step(5), "epoch": Generation(1), "reason": "no space", "again": again}
    assert commits(cluster.tell(CommitFailed(at=cluster.at(), **failure))) == []

    assert commits(cluster.after(0.5).beat(step=5)) == []
    assert commits(cluster.after(1.5).beat(step=5)) == expected


def test_a_commit_that_failed_is_not_tried_again_once_a_newer_one_stands(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    written(cluster, 5)
    failure = {"step": Step(5), "epoch": Generation(1), "reason": "no space", "again": True}
    cluster.tell(CommitFailed(at=cluster.at(), **failure))
    written(cluster, 6)

    cluster.tell(
        CheckpointCommitted(at=cluster.at(), step=Step(6), epoch=Generation(1), key="commits/6")
    )

    assert commits(cluster.after(3).beat(step=6)) == []


def test_a_successor_does_not_repeat_the_commit_of_a_generation_that_is_over(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    assert commits(written(cluster, 5)) == [5]
    cluster.exit(1, step=5)
    assert cluster.state.generation == 2

    decisions = cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=2))

    assert commits(decisions) == []
