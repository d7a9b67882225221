"""A shard of the durable tier that several replicas need: read by one, for all of them."""

import asyncio
import threading
from pathlib import Path

import pytest

from orchestrator.agent.durable import DurableCheckpoint, DurableShard
from orchestrator.agent.keeper import Tier
from orchestrator.agent.reading import READS_AT_ONCE
from orchestrator.protocol.ids import Generation, Rank
from orchestrator.protocol.messages import Ancestor, Holding
from orchestrator.protocol.rank import Restore
from storage import manifest as manifests
from storage.commit import commit, write_shard
from storage.encrypted import EncryptedStore
from storage.errors import StorageError
from storage.faulty import FaultyStore
from storage.manifest import commit_key, digests_key, make_manifest
from storage.memory import MemoryStore
from tests.shards import GENERATION, HERE, OTHER, RANK, STEP, THERE, Node, content, sealed, two

pytestmark = pytest.mark.process
NEIGHBOUR = Rank(6)
"""Of a third replica, on the node of RANK."""


class Tape:
    """A durable tier that has a checkpoint, and keeps which bodies it was asked for.

    Attributes:
        gate: reads of bodies wait for it; closed, if a test has cleared it.
    """

    def __init__(self, key: bytes = b"") -> None:
        self.bodies: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.inner = FaultyStore(MemoryStore())
        self.store = FaultyStore(EncryptedStore(self.inner, key) if key else self.inner)
        receipts = [write_shard(self.store, *sealed(shard, 7, 2)) for shard in range(4)]
        manifest = make_manifest(receipts, run_id="run-7", model="llama-test", step=7, epoch=2)
        commit(self.store, manifest, newest_epoch_known=2)
        self.store.before = self._note

    def shard(self) -> DurableShard:
        return DurableShard(DurableCheckpoint(self.store, commit_key(7, 2)), 0)

    def _note(self, operation: str, key: str) -> None:
        if operation == "get" and key.endswith(".st"):
            assert self.gate.wait(20)
            self.bodies.append(key)


def prepare(
    node: Node, tape: Tape, rank: Rank, source: str, *, timeout_s: float = 20.0
) -> "asyncio.Task[tuple[Restore, Tier]]":
    return asyncio.create_task(
        node.keeper.prepare(rank, STEP, source, tape.shard(), staged_as=RANK, timeout_s=timeout_s)
    )


def test_one_replica_reads_a_shard_and_the_others_wait_and_have_it_from_there(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            tape = Tape()
            here.begin(9, {THERE: there}, 7)
            there.begin(9, {HERE: here}, 7)
            tape.gate.clear()

            others = [prepare(there, tape, OTHER, HERE), prepare(here, tape, NEIGHBOUR, HERE)]
            reader = prepare(here, tape, RANK, "")
            done, _ = await asyncio.wait(others, timeout=0.5)
            assert done == set()
            tape.gate.set()
            found = [await one for one in (reader, *others)]

            assert [tier for _, tier in found] == ["durable", "fetched", "fetched"]
            assert len(tape.bodies) == len(set(tape.bodies)) == 1
            assert {content(restore) for restore, _ in found} == {bytes(sealed(RANK, 7, 2)[1])}
            assert there.keeper.holdings() == (Holding(OTHER, STEP),)
            assert here.keeper.holdings() == (Holding(RANK, STEP), Holding(NEIGHBOUR, STEP))

    asyncio.run(scenario())


def test_who_can_not_reach_the_reader_reads_the_shard_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            tape = Tape()
            there.begin(9, {HERE: here}, 7)
            here.keeper.unreachable = True

            restore, tier = await asyncio.wait_for(prepare(there, tape, OTHER, HERE), 5)

            assert (tier, content(restore)) == ("durable", sealed(RANK, 7, 2)[1])

    asyncio.run(scenario())


@pytest.mark.parametrize("source", [HERE, THERE, "node-9"])
def test_a_reader_that_never_has_it_is_waited_for_half_of_the_time_and_no_longer(
    tmp_path: Path, source: str
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            tape = Tape()
            for node in (here, there):
                node.begin(9, {HERE: here}, 7)
            begun = asyncio.get_running_loop().time()

            _, tier = await prepare(there, tape, OTHER, source, timeout_s=2.0)

            assert tier == "durable"
            assert 1.0 <= asyncio.get_running_loop().time() - begun < 2.0

    asyncio.run(scenario())


def test_what_the_reader_staged_in_another_lineage_is_not_taken_for_the_checkpoint(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            tape = Tape()
            # Its node has not heard of the new generation yet, and its step 7 is another one.
            here.begin(5, {THERE: there}, None)
            here.stage(RANK, 7, 5)
            there.begin(9, {HERE: here}, 7)

            other = prepare(there, tape, OTHER, HERE)
            done, _ = await asyncio.wait([other], timeout=0.3)
            assert done == set()
            lineage = (Ancestor(GENERATION, STEP),)
            here.keeper.begin(Generation(9), {THERE: there.address}, STEP, lineage)
            await prepare(here, tape, RANK, "")
            restore, tier = await other

            assert tier == "fetched"
            assert content(restore) == sealed(RANK, 7, 2)[1]
            assert len(tape.bodies) == 1

    asyncio.run(scenario())


def test_a_tier_that_fails_who_has_to_read_it_after_all_is_an_error_of_storage(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            tape = Tape()
            there.begin(9, {HERE: here}, 7)
            here.keeper.unreachable = True
            tape.store.down = True

            with pytest.raises(StorageError):
                await prepare(there, tape, OTHER, HERE)

            assert (there.files(), there.keeper.holdings()) == ([], ())

    asyncio.run(scenario())


def test_the_ranks_of_a_node_read_the_record_of_a_checkpoint_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            tape = Tape()
            asked: list[str] = []
            tape.store.before = lambda operation, key: asked.append(f"{operation} {key}")
            checkpoint = DurableCheckpoint(tape.store, commit_key(7, 2))
            here.begin(9, {THERE: there}, 7)
            tape.store.down = True
            with pytest.raises(StorageError):
                await here.keeper.prepare(RANK, STEP, "", DurableShard(checkpoint, 0))
            tape.store.down = False
            asked.clear()

            ranks = [Rank(rank) for rank in range(4)]
            reading = (
                here.keeper.prepare(rank, STEP, "", DurableShard(checkpoint, rank))
                for rank in ranks
            )
            found = await asyncio.gather(*reading)

            assert [content(restore) for restore, _ in found] == [
                sealed(rank, 7, 2)[1] for rank in ranks
            ]
            assert len([line for line in asked if line.endswith(commit_key(7, 2))]) == 1

    asyncio.run(scenario())


def test_the_ranks_of_a_node_read_the_digests_of_a_group_of_shards_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from an encrypted store, where no part of a blob can be read that is smaller."""
    monkeypatch.setattr(manifests, "GROUPS_MAX", 2)

    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            tape = Tape(key=bytes(32))
            asked: list[str] = []
            tape.inner.before = lambda operation, key: asked.append(f"{operation} {key}")
            checkpoint = DurableCheckpoint(tape.store, commit_key(7, 2))
            here.begin(9, {THERE: there}, 7)
            ranks = [Rank(rank) for rank in range(4)]

            found = await asyncio.gather(
                *(
                    here.keeper.prepare(rank, STEP, "", DurableShard(checkpoint, rank))
                    for rank in ranks
                )
            )

            assert [content(restore) for restore, _ in found] == [
                sealed(rank, 7, 2)[1] for rank in ranks
            ]
            # Two groups; each time its header, and its only block.
            assert asked.count(f"get {digests_key(7, 2)}") == 4

    asyncio.run(scenario())


def test_a_record_that_never_comes_keeps_one_thread_and_leaves_the_others_to_whoever_reads(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            tape, hangs = Tape(), threading.Event()
            stuck = FaultyStore(tape.store, before=lambda _, __: hangs.wait(20))
            checkpoint = DurableCheckpoint(stuck, commit_key(7, 2))
            here.begin(9, {THERE: there}, 7)
            ranks = [Rank(rank) for rank in range(READS_AT_ONCE)]
            waiting = [
                asyncio.create_task(
                    here.keeper.prepare(rank, STEP, "", DurableShard(checkpoint, 0), timeout_s=0.3)
                )
                for rank in ranks
            ]
            for one in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(one, StorageError)

            _, tier = await here.keeper.prepare(RANK, STEP, "", tape.shard(), timeout_s=5.0)

            assert tier == "durable"
            hangs.set()

    asyncio.run(scenario())
