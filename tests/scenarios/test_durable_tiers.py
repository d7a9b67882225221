"""What a controller makes of a durable tier that holds more, less or other than it should."""

from typing import Any

import pytest

from orchestrator.core.decisions import EndRun, StartGeneration
from orchestrator.core.events import CheckpointCommitted, CheckpointFound, ControllerStarted
from orchestrator.protocol.ids import Generation, NodeId, Step
from orchestrator.protocol.messages import PreparationFailed
from tests.conftest import Cluster


def found(cluster: Cluster, step: int | None, **more: Any) -> list[Any]:
    epoch = None if step is None else Generation(more.pop("epoch", 1))
    key = "" if step is None else f"commits/{step}-{epoch}"
    event = CheckpointFound(
        at=cluster.at(), step=None if step is None else Step(step), epoch=epoch, key=key, **more
    )
    return list(cluster.tell(event))


def joined(cluster: Cluster) -> Cluster:
    """A new life: nothing is known, and every node is there."""
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=1))
    for node in ("node-0", "node-1", "node-2"):
        cluster.join(node)
    return cluster


def without_memory(cluster: Cluster, *, seed: bool = True) -> Cluster:
    """A life that committed step 50, trained on to 60, and has nothing but the seed in memory."""
    found(joined(cluster), None)
    cluster.resume()
    if seed:
        cluster.hold(0)
    cluster.train(60)
    cluster.tell(
        CheckpointCommitted(at=cluster.at(), step=Step(50), epoch=Generation(1), key="commits/50-1")
    )
    cluster.after(0.1).exit(1, step=60)
    return cluster


def only(kind: type, decisions: list[Any]) -> Any:
    (decision,) = [d for d in decisions if isinstance(d, EndRun | StartGeneration)]
    assert isinstance(decision, kind)
    return decision


@pytest.mark.parametrize("epoch_seen", [2, 7])
def test_a_new_life_starts_above_the_epoch_of_a_checkpoint_that_was_rejected(
    cluster: Cluster, epoch_seen: int
) -> None:
    rejected = ("step 80, epoch 2: shard 0 is corrupt",)

    order = only(
        StartGeneration,
        found(joined(cluster), 60, rejected=rejected, epoch_seen=Generation(epoch_seen)),
    )

    assert order.generation == epoch_seen + 1
    assert order.restore.step == 60


def test_shards_that_nobody_committed_keep_their_epoch_from_a_run_that_begins_at_the_seed(
    cluster: Cluster,
) -> None:
    order = only(StartGeneration, found(joined(cluster), None, epoch_seen=Generation(1)))

    assert (order.generation, order.restore) == (2, None)


def test_an_epoch_that_appeared_while_the_run_went_on_is_not_used_again(cluster: Cluster) -> None:
    order = only(
        StartGeneration, found(without_memory(cluster), 50, epoch_seen=Generation(4), shards=2)
    )

    assert order.generation == 5


@pytest.mark.parametrize("seed_in_memory", [True, False])
def test_an_empty_tier_is_no_reason_to_begin_at_the_seed_if_a_commit_is_known(
    cluster: Cluster, *, seed_in_memory: bool
) -> None:
    end = only(EndRun, found(without_memory(cluster, seed=seed_in_memory), None))

    assert end.state == "Failed"
    assert "has no checkpoint, and this run committed some, the newest of step 50" in end.reason
    assert "hint: " in end.reason


def test_a_tier_that_lost_all_is_no_reason_to_give_up_what_memory_holds(cluster: Cluster) -> None:
    cluster.start()
    cluster.train(40)
    cluster.hold(40)
    cluster.train(20)
    cluster.tell(
        CheckpointCommitted(at=cluster.at(), step=Step(50), epoch=Generation(1), key="commits/50-1")
    )
    cluster.after(0.1).exit(1, step=60)

    assert only(StartGeneration, found(cluster, None)).restore.step == 40


@pytest.mark.parametrize("shards", [1, 4])
def test_a_checkpoint_that_was_cut_otherwise_ends_the_run_and_says_how_to_go_on(
    cluster: Cluster, shards: int
) -> None:
    end = only(EndRun, found(joined(cluster), 60, shards=shards))

    assert end.state == "Failed"
    assert f"step 60 has {shards} shard" in end.reason
    assert "this run has 2" in end.reason
    assert "hint: " in end.reason
    assert "to go on in this cut" in end.reason
    assert "spec.trainer.continueFrom" in end.reason


def test_a_checkpoint_that_fits_or_of_which_the_journal_does_not_say_it_is_restored(
    cluster: Cluster,
) -> None:
    assert only(StartGeneration, found(joined(cluster), 60, shards=2)).restore.step == 60
    assert only(StartGeneration, found(joined(Cluster()), 60)).restore.step == 60


def test_a_checkpoint_that_can_not_be_brought_to_a_node_is_looked_for_again(
    cluster: Cluster,
) -> None:
    found(joined(cluster), 60, shards=2)
    fact = PreparationFailed(
        generation=cluster.state.generation,
        step=Step(60),
        tier="durable",
        reason="ValueError: shard is 2, must be in 0..1",
    )

    cluster.after(0.1).say(NodeId("node-0"), fact)

    (incident,) = cluster.state.incidents
    assert "shard is 2" in incident.findings[0].evidence
