"""Real agents that keep copies for each other, write to the durable tier, and stand in."""

import time
from collections.abc import Callable

import msgspec
import pytest

from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import (
    Ancestor,
    Beat,
    Fence,
    Joined,
    Prepared,
    RankExited,
    RanksFinished,
    ShardsHeld,
    ShardsWritten,
)
from storage.commit import commit
from storage.local import LocalStore
from storage.manifest import ShardReceipt, commit_key, make_manifest
from tests.programs.played import (
    Agent,
    Controller,
    alive,
    flip_a_bit,
    flip_a_bit_of,
    holder,
    slots_of,
    wait_for,
)

pytestmark = pytest.mark.process
Start = Callable[..., Agent]
BUDDIES = {"node-0": "node-1", "node-1": "node-0"}


def pair(
    controller: Controller, start: Start, *, ranks: int = 1, **job: object
) -> dict[str, Agent]:
    """Start two nodes, made for a rank each."""
    controller.job.update(job)
    agents = {node: start(node, ranks=ranks) for node in BUDDIES}
    for node in agents:
        controller.hear(Joined, node)
    return agents


def test_the_ranks_of_a_lost_node_resume_on_a_spare_from_their_copies(
    controller: Controller, start: Start
) -> None:
    agents = pair(controller, start, save_every=10)
    start("node-2", ranks=1)
    controller.hear(Joined, "node-2")
    controller.begin(1, ["node-0", "node-1"], buddies=BUDDIES)
    controller.hear(ShardsHeld, "node-0", where=lambda fact: holder(fact, 1, 10))
    controller.hear(ShardsHeld, "node-1", where=lambda fact: holder(fact, 0, 10))

    agents["node-1"].process.kill()
    controller.begin(
        2, ["node-0", "node-2"], dismiss=(1,), restore=10, sources=("node-0", "node-0")
    )

    controller.reached("stepped", 2)
    controller.reached("stepped", 2, "node-2")
    own, fetched = controller.hear(Prepared)[1], controller.hear(Prepared, "node-2")[1]
    assert (own.own, own.fetched, own.durable) == (1, 0, 0)
    assert (fetched.own, fetched.fetched, fetched.durable) == (0, 1, 0)
    # The trainer checks that what it restores is of its rank and step.
    assert not controller.messages(RankExited, "node-2")


def test_a_bit_that_flipped_in_memory_comes_back_from_the_buddy_and_is_on_record(
    controller: Controller, start: Start
) -> None:
    agents = pair(controller, start, save_every=10, nap_at=20, nap_s=60)
    controller.begin(1, ["node-0", "node-1"], buddies=BUDDIES)
    for rank in (0, 1):
        controller.hear(ShardsHeld, "node-1", where=lambda fact, rank=rank: holder(fact, rank, 10))
    flip_a_bit(agents["node-0"].memory, rank=0)

    controller.begin(
        2, ["node-0", "node-1"], restore=10, sources=("node-0", "node-1"), buddies=BUDDIES
    )

    _, prepared = controller.hear(Prepared, "node-0")
    assert (prepared.own, prepared.fetched, prepared.durable) == (1, 0, 0)
    (copy,) = prepared.mended
    assert (copy.rank, copy.origin, copy.chunks) == (0, "node-1", 1)
    assert "param/w" in copy.what
    assert controller.hear(Prepared, "node-1")[1].mended == ()
    # The trainer verifies what it restores.
    controller.reached("stepped", 2)


def test_a_copy_that_the_buddy_has_in_bad_shape_is_replaced_when_ranks_train_again(
    controller: Controller, start: Start
) -> None:
    agents = pair(controller, start, save_every=10, durable_every=10, nap_at=20, nap_s=60)
    memory = {node: agent.memory for node, agent in agents.items()}
    controller.begin(1, ["node-0", "node-1"], buddies=BUDDIES)
    for rank in (0, 1):
        controller.hear(ShardsHeld, "node-1", where=lambda fact, rank=rank: holder(fact, rank, 10))
    controller.hear(ShardsWritten, "node-0", where=lambda fact: fact.step == 10)
    (slot,) = memory["node-0"].glob("rank-00000.slot-*")
    (bad,) = memory["node-1"].glob("copy-00000-10-*")
    for path in (slot, bad):
        flip_a_bit_of(path)

    controller.begin(
        2, ["node-0", "node-1"], restore=10, sources=("node-0", "node-1"), buddies=BUDDIES
    )

    (mended,) = controller.hear(Prepared, "node-0")[1].mended
    assert (mended.origin, mended.chunks) == ("", 1)
    controller.reached("stepped", 2)
    wait_for(lambda: not bad.exists())
    (anew,) = memory["node-1"].glob("copy-00000-10-*")
    assert anew.read_bytes() == slot.read_bytes()


def test_a_node_that_missed_a_generation_restores_nothing_that_was_abandoned_meanwhile(
    controller: Controller, start: Start
) -> None:
    agents = pair(controller, start, save_every=10)
    controller.begin(1, ["node-0"])
    # It comes to the same steps as the other, and more of them.
    controller.hear(ShardsHeld, "node-0", where=lambda fact: holder(fact, 0, 20))
    # Without it, generation 2 goes back to step 10, and does step 20 again.
    controller.begin(2, ["node-1"], restore=10, sources=("node-0",))
    controller.hear(ShardsHeld, "node-1", where=lambda fact: holder(fact, 0, 20))
    line = (Ancestor(Generation(1), Step(10)), Ancestor(Generation(2), Step(20)))

    controller.begin(3, ["node-0"], restore=20, ancestors=line, sources=("node-1",))

    _, prepared = controller.hear(Prepared, "node-0")
    assert (prepared.own, prepared.fetched) == (0, 1)
    controller.reached("stepped", 3)
    assert agents["node-0"].restored(0)[-1] == (3, 20, 2)


def test_a_fenced_node_holds_nothing_any_more_of_what_its_fence_says_was_abandoned(
    controller: Controller, start: Start
) -> None:
    pair(controller, start, save_every=10)
    controller.begin(1, ["node-0"])
    controller.hear(ShardsHeld, "node-0", where=lambda fact: holder(fact, 0, 20))

    fenced = time.monotonic()
    controller.send(
        "node-0",
        Fence(
            order="f",
            generation=Generation(2),
            restore=Step(10),
            ancestors=(Ancestor(Generation(1), Step(10)),),
        ),
    )
    controller.hear(Beat, "node-0", since=fenced, where=lambda beat: beat.generation == 2)
    controller.send_raw("node-0", "{}")

    _, joined = controller.hear(Joined, "node-0", since=fenced)
    assert joined.generation == 2
    assert [holding.step for holding in joined.holdings] == [10]


def test_a_rank_that_is_seated_elsewhere_leaves_no_slots_behind_and_finds_new_ones_later(
    controller: Controller, start: Start
) -> None:
    agents = pair(controller, start, save_every=5)
    agent = agents["node-0"]
    controller.begin(1, ["node-0", "node-1"])
    controller.hear(ShardsHeld, "node-0", where=lambda fact: holder(fact, 0, 10))
    controller.begin(2, ["node-1", "node-0"])
    controller.hear(ShardsHeld, "node-0", where=lambda fact: holder(fact, 1, 10))

    wait_for(lambda: not list(agent.memory.glob("rank-00000.slot-*")))

    assert list(agent.memory.glob("rank-00001.slot-*"))
    again = controller.begin(3, ["node-0", "node-1"])
    controller.hear(
        ShardsHeld, "node-0", since=again, where=lambda f: f.generation == 3 and holder(f, 0, 10)
    )
    # Memory is what is restored from, so what was staged lies where the agent looks.
    controller.begin(4, ["node-0", "node-1"], restore=10, sources=("node-0", "node-1"))
    assert controller.hear(Prepared, "node-0", where=lambda fact: fact.generation == 4)[1].own == 1
    wait_for(lambda: not list(agent.memory.glob("gone-*")))


def test_processes_map_no_slot_but_those_of_the_rank_that_they_are(
    controller: Controller, start: Start
) -> None:
    agent = pair(controller, start, ranks=3, save_every=5)["node-0"]
    controller.begin(1, ["node-0", "node-1"])
    controller.hear(ShardsHeld, "node-0", where=lambda fact: holder(fact, 0, 10))
    assert slots_of(agent.rank_pid(0, 1))

    controller.begin(2, ["node-1", "node-0"])
    controller.hear(ShardsHeld, "node-0", where=lambda fact: holder(fact, 1, 10))
    seated = agent.rank_pid(1, 2)
    wait_for(lambda: all(slots_of(pid) == [] for pid in agent.children() if pid != seated))
    assert {name[:10] for name in slots_of(seated)} == {"rank-00001"}

    controller.send("node-0", Fence(order="f", generation=Generation(3)))
    wait_for(lambda: all(slots_of(pid) == [] for pid in agent.children()))
    assert alive(seated)


def test_each_shard_is_made_durable_once_and_a_world_without_memory_resumes_from_it(
    controller: Controller, start: Start
) -> None:
    agents = pair(controller, start, durable_every=20, steps=40)
    controller.begin(1, ["node-0", "node-1"])
    receipts = []
    for node in agents:
        _, fact = controller.hear(ShardsWritten, node, where=lambda f: f.step == 40)
        assert (fact.model, len(fact.receipts)) == ("steps", 1)
        receipts += [
            ShardReceipt(shard=r[0], size=r[1], index_digest=r[2])
            for r in map(msgspec.structs.astuple, fact.receipts)
        ]
        controller.hear(RanksFinished, node)
    store = LocalStore(controller.folder / "checkpoints")
    manifest = make_manifest(receipts, run_id="test", model="steps", step=40, epoch=1)
    commit(store, manifest, newest_epoch_known=1)
    for node, agent in agents.items():
        assert agent.terminate() == 0
        start(node, ranks=1, incarnation=2)
        controller.hear(Joined, node, where=lambda joined: joined.incarnation == 2)

    controller.begin(
        2, ["node-0", "node-1"], restore=40, sources=("", ""), commit=commit_key(40, 1)
    )

    for node in agents:
        assert controller.hear(Prepared, node)[1].durable == 1
        _, finished = controller.hear(RanksFinished, node, where=lambda f: f.generation == 2)
        assert finished.step == 40


def test_of_two_replicas_only_the_first_writes(controller: Controller, start: Start) -> None:
    controller.job.update(durable_every=20, steps=40, await_persisted=True)
    start()
    controller.hear(Joined)
    controller.begin(1, ["node-0", "node-0"], shard_of=(0, 0))

    _, fact = controller.hear(ShardsWritten, where=lambda f: f.step == 40)
    controller.hear(RanksFinished)

    assert [receipt.shard for receipt in fact.receipts] == [0]
    bodies = sorted((controller.folder / "checkpoints").rglob("*.st"))
    assert [body.name for body in bodies] == ["s0.st", "s0.st"]


def test_a_shard_that_was_staged_just_before_the_rank_died_is_not_lost(
    controller: Controller, start: Start
) -> None:
    start()
    controller.job.update(save_every=7, raise_at=8)
    controller.hear(Joined)
    controller.begin(1, ["node-0", "node-0"])

    for rank in (0, 1):
        controller.hear(ShardsHeld, where=lambda fact, rank=rank: holder(fact, rank, 7))
    wait_for(lambda: len(controller.messages(RankExited)) == 2)


def test_a_spare_gets_what_its_ranks_will_need_ready_before_it_has_a_seat(
    controller: Controller, start: Start
) -> None:
    spare = start(ranks=2)
    controller.hear(Joined)

    # Both of its processes are told; where that is one's work, a lock on the node sees to it.
    parked = spare.work / "parked.log"
    wait_for(lambda: parked.exists() and parked.read_text().count("prepared") == 2)
