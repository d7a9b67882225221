"""Which saved state counts: what was rejected does not, one copy of two does not, a slip passes."""

from typing import Any

import pytest

from orchestrator.core.decisions import (
    CommitCheckpoint,
    EndRun,
    RetainMemory,
    SearchCheckpoints,
    StartGeneration,
)
from orchestrator.core.events import CommitFailed, ControllerStarted, NodeDisconnected
from orchestrator.core.phases import RunPhase
from orchestrator.policy.switches import MEMORY_FIRST
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import (
    Holding,
    NodeUnusable,
    PreparationFailed,
    ShardsHeld,
)
from tests.conftest import Cluster
from tests.journals import SHORT, answer, be_done, write_step
from tests.runfiles import text


@pytest.fixture
def rejected() -> Cluster:
    """The checkpoint of the last step, 20, was rejected; generation 2 goes on from step 10."""
    cluster = Cluster(SHORT)
    cluster.start()
    cluster.train(10)
    answer(cluster, 10)
    cluster.train(10)
    assert write_step(cluster, 20) == [20]
    answer(cluster, 20)
    cluster.after(0.1).exit(1, step=20)
    cluster.after(0.1).found(10, rejected=("step 20, epoch 1: shard 1 is corrupt",))
    assert (cluster.state.generation, cluster.state.start_step) == (2, 10)
    cluster.resume()
    cluster.train(10)
    return cluster


@pytest.mark.parametrize("off", [(), (MEMORY_FIRST,)])
def test_what_memory_holds_counts_unless_the_run_goes_by_the_durable_tier_alone(
    off: tuple[str, ...],
) -> None:
    cluster = Cluster(text("short", trainer={"steps": 20}, recovery={"disable": list(off)}))
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    before = cluster.exit(1, step=10)
    cluster.resume()
    write_step(cluster, 10)
    answer(cluster, 10)
    cluster.train(5)
    cluster.hold(15)

    after = cluster.exit(1, step=15)

    # While the durable tier has nothing, memory is all there is.
    assert [d.restore.step for d in before if isinstance(d, StartGeneration) and d.restore] == [10]
    if off:
        assert [d for d in after if isinstance(d, SearchCheckpoints)]
        assert not [d for d in after if isinstance(d, StartGeneration)]
        (order,) = [d for d in cluster.found(10) if isinstance(d, StartGeneration)]
        assert order.restore is not None
        assert (order.restore.step, order.restore.commit != "") == (10, True)
    else:
        (order,) = [d for d in after if isinstance(d, StartGeneration)]
        assert order.restore is not None
        assert (order.restore.step, order.restore.commit) == (15, "")


def test_a_run_does_not_succeed_on_a_checkpoint_that_was_rejected(rejected: Cluster) -> None:
    assert not [d for d in be_done(rejected) if isinstance(d, EndRun)]
    assert rejected.state.phase is RunPhase.FINISHING


def test_a_step_whose_checkpoint_was_rejected_is_committed_again(rejected: Cluster) -> None:
    assert write_step(rejected, 20) == [20]
    answer(rejected, 20)

    (end,) = [d for d in be_done(rejected) if isinstance(d, EndRun)]
    assert end.state == "Succeeded"


def test_a_rejected_checkpoint_is_no_reason_to_give_up_the_commit_of_an_older_step(
    rejected: Cluster,
) -> None:
    assert write_step(rejected, 15) == [15]
    step, epoch = Step(15), rejected.state.generation
    failure = {"step": step, "epoch": epoch, "reason": "no space", "again": True}
    rejected.tell(CommitFailed(at=rejected.at(), **failure))

    decisions = rejected.after(3).beat(step=20)

    assert [d.step for d in decisions if isinstance(d, CommitCheckpoint)] == [15]


def test_the_first_agent_to_meet_a_successor_does_not_cost_the_older_copies(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    cluster.train(2)
    one_copy = tuple(Holding(Rank(rank), Step(12)) for rank in range(4))
    cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=2))

    decisions = cluster.after(0.1).join("node-0", generation=1, mark=5, holdings=one_copy)

    assert not [d for d in decisions if isinstance(d, RetainMemory)]
    assert Step(10) in cluster.state.holdings


def test_the_only_node_that_is_left_keeps_one_copy_once_the_others_are_silent(
    cluster_of: Any,
) -> None:
    text = SHORT.replace("count: 2, ranksPerNode: 2", "count: 1, ranksPerNode: 4")
    cluster = cluster_of(text)
    cluster.start()
    cluster.train(10)
    one_copy = tuple(Holding(Rank(rank), Step(10)) for rank in range(4))
    cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=2))
    cluster.after(0.1).join("node-0", generation=1, mark=5, holdings=one_copy)
    decisions: list[Any] = []

    while not decisions and cluster.now < 30:
        decisions = cluster.after(0.5).beat(step=10, heard=("node-0",))

    assert [d.step for d in decisions if isinstance(d, RetainMemory)] == [10]


def test_a_step_that_could_not_be_read_once_counts_again_when_it_was_computed_anew(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    cluster.exit(1, step=5)
    fact = PreparationFailed(
        generation=cluster.state.generation, step=Step(5), tier="memory", reason="no route to peer"
    )
    cluster.say("node-0", fact)
    cluster.rest()
    cluster.after(0.1).found()
    assert (cluster.state.generation, cluster.state.start_step) == (3, 0)
    cluster.resume()
    cluster.train(6)
    cluster.hold(5)

    decisions = cluster.exit(1, step=6)

    (order,) = [d for d in decisions if isinstance(d, StartGeneration)]
    assert order.restore is not None
    assert order.restore.step == 5


def test_a_node_that_can_not_train_any_more_still_gives_away_what_it_staged(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    cluster.after(0.1)
    for node in ("node-0", "node-1"):
        own = cluster.state.ranks_of(NodeId(node))
        held = tuple(Holding(rank, Step(10)) for rank in own)
        cluster.say(node, ShardsHeld(generation=Generation(1), holdings=held))

    (order,) = [
        d
        for d in cluster.say("node-1", NodeUnusable(reason="a GPU fell off the bus"))
        if isinstance(d, StartGeneration)
    ]

    assert order.seats == ("node-0", "node-0", "node-2", "node-2")
    assert order.restore is not None
    assert (order.restore.step, order.restore.commit) == (10, "")
    assert order.restore.sources == ("node-0", "node-0", "node-1", "node-1")


def test_a_node_that_is_not_connected_gives_away_nothing(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    own = tuple(Holding(rank, Step(10)) for rank in cluster.state.ranks_of(NodeId("node-1")))
    cluster.after(0.1).say("node-1", ShardsHeld(generation=Generation(1), holdings=own))
    assert cluster.state.holders(Step(10), Rank(2)) == ("node-1",)

    cluster.tell(NodeDisconnected(at=cluster.at(), node=NodeId("node-1")))

    assert cluster.state.holders(Step(10), Rank(2)) == ()
