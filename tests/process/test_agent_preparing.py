"""What an agent says when the state of its ranks can not be brought to it."""

from collections.abc import Callable

import pytest

from orchestrator.protocol.messages import Joined, PreparationFailed
from storage.commit import commit, write_shard
from storage.local import LocalStore
from storage.manifest import commit_key, make_manifest
from storage.shard import Chunk, ShardMeta, plan, seal
from tests.programs.played import Agent, Controller

pytestmark = pytest.mark.process

LAYOUT = plan([Chunk(fqn="w", state="p", dtype="F32", shape=(8,), global_shape=(8,), offset=(0,))])


def test_a_shard_that_the_checkpoint_does_not_have_is_told_and_the_agent_lives_on(
    controller: Controller, start: Callable[..., Agent]
) -> None:
    store = LocalStore(controller.folder / "checkpoints")
    body = bytearray(LAYOUT.size)
    meta = ShardMeta(run_id="test", model="m", step=40, epoch=1, shard=0, shards=1)
    receipt = write_shard(store, seal(LAYOUT, body, meta), body)
    manifest = make_manifest([receipt], run_id="test", model="m", step=40, epoch=1)
    commit(store, manifest, newest_epoch_known=1)
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
