"""What an agent says when the state of its ranks can not be brought to it."""

from collections.abc import Callable

import pytest

from orchestrator.protocol.ids import NodeId, Rank
from orchestrator.protocol.messages import FailedCopy, Joined, PreparationFailed, ShardsHeld
from storage.commit import commit, write_shard
from storage.local import LocalStore
from storage.manifest import commit_key, make_manifest
from storage.shard import Chunk, ShardMeta, plan, seal
from tests.programs.played import Agent, Controller, flip_a_bit, holder

pytestmark = pytest.mark.process

LAYOUT = plan([Chunk(fqn="w", state="p", dtype="F32", shape=(8,), global_shape=(8,), offset=(0,))])


def stored(controller: Controller, step: int) -> None:
    """Commit a checkpoint of one shard."""
    store = LocalStore(controller.folder / "checkpoints")
    body = bytearray(LAYOUT.size)
    meta = ShardMeta(run_id="test", model="m", step=step, epoch=1, shard=0, shards=1)
    receipt = write_shard(store, seal(LAYOUT, body, meta), body)
    manifest = make_manifest([receipt], run_id="test", model="m", step=step, epoch=1)
    commit(store, manifest, newest_epoch_known=1)


def test_a_shard_that_the_checkpoint_does_not_have_is_told_and_the_agent_lives_on(
    controller: Controller, start: Callable[..., Agent]
) -> None:
    stored(controller, 40)
    start()
    controller.hear(Joined)

    controller.begin(
        2,
        ["node-0", "node-0"],
        restore=40,
        sources=("", ""),
        commit=commit_key(40, 1),
        shard_of=(4, 5),
    )

    _, fact = controller.hear(PreparationFailed)
    assert (fact.generation, fact.step, fact.tier) == (2, 40, "durable")
    assert fact.reason.startswith("ValueError: shard is ")
    controller.begin(3, ["node-0", "node-0"])
    controller.reached("stepped", 3)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("../../secrets", "ForeignCheckpointError: no key of a commit: '../../secrets'"),
        (commit_key(30, 1), "BlobNotFoundError: "),
        (commit_key(20, 1), "ForeignCheckpointError: checkpoint of step 20, epoch 1, expected"),
    ],
)
def test_no_rank_is_sent_to_a_checkpoint_of_another_cut_that_is_not_the_one_that_was_meant(
    controller: Controller, start: Callable[..., Agent], key: str, says: str
) -> None:
    stored(controller, 20)
    start()
    controller.hear(Joined)

    controller.begin(
        2, ["node-0", "node-0"], restore=40, sources=("", ""), commit=key, cut_anew=True
    )

    _, fact = controller.hear(PreparationFailed)
    assert (fact.generation, fact.step, fact.tier) == (2, 40, "durable")
    assert fact.reason.startswith(says)
    assert fact.copies == ()
    controller.begin(3, ["node-0", "node-0"])
    controller.reached("stepped", 3)


def test_a_copy_that_is_damaged_is_named_and_no_longer_told_to_be_held(
    controller: Controller, start: Callable[..., Agent]
) -> None:
    controller.job.update(save_every=10, nap_at=20, nap_s=60)
    agent = start()
    controller.hear(Joined)
    controller.begin(1, ["node-0", "node-0"])
    for rank in (0, 1):
        controller.hear(ShardsHeld, where=lambda fact, rank=rank: holder(fact, rank, 10))
    flip_a_bit(agent.memory, rank=1)

    controller.begin(2, ["node-0", "node-0"], restore=10, sources=("node-0", "node-0"))

    at, fact = controller.hear(PreparationFailed)
    assert (fact.generation, fact.tier) == (2, "memory")
    assert fact.copies == (FailedCopy(NodeId("node-0"), Rank(1), "corrupt"),)
    told, holdings = controller.hear(ShardsHeld, where=lambda fact: fact.generation == 2)
    assert told <= at
    assert holder(holdings, 0, 10)
    assert not holder(holdings, 1, 10)


def test_a_node_out_of_reach_is_asked_again_for_seconds_and_then_named(
    controller: Controller, start: Callable[..., Agent]
) -> None:
    start()
    controller.hear(Joined)

    at = controller.begin(
        2,
        ["node-0", "node-0"],
        restore=10,
        sources=("node-9", "node-9"),
        peers={"node-9": "127.0.0.1:1"},
    )

    failed, fact = controller.hear(PreparationFailed)
    assert failed - at > 3.5
    assert fact.copies[0].node == "node-9"
    assert {copy.kind for copy in fact.copies} == {"unreachable"}
