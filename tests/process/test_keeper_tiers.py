"""Shards between memory and the durable tier: written, and read back only if memory has none."""

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from orchestrator.agent import mending
from orchestrator.agent.durable import DurableCheckpoint, DurableShard, DurableTier
from orchestrator.agent.impressions import Written, of_index
from orchestrator.agent.reading import READS_AT_ONCE
from orchestrator.agent.shards import NoRoomError, NotHeldError
from orchestrator.agent.transfer import allocate, create, reserve, write_all
from orchestrator.agent.writing import WRITES_AT_ONCE
from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.messages import Receipt
from storage.commit import commit, write_shard
from storage.errors import (
    BlobNotFoundError,
    ForeignCheckpointError,
    ShardCorruptError,
    StorageFullError,
    StorageUnavailableError,
)
from storage.faulty import FaultyStore
from storage.manifest import commit_key, make_manifest
from storage.memory import MemoryStore
from storage.shard import index_digest, open_views
from storage.wrappers import CountingStore
from tests.shards import GENERATION, HERE, RANK, STEP, THERE, sealed, settled, two

pytestmark = pytest.mark.process
COMMIT = commit_key(7, 2)


def committed(store: MemoryStore | CountingStore | FaultyStore) -> DurableShard:
    """Put a checkpoint of step 7 into the store; return where shard 0 of it lies."""
    receipts = [write_shard(store, *sealed(shard, 7, 2)) for shard in range(4)]
    manifest = make_manifest(receipts, run_id="run-7", model="llama-test", step=7, epoch=2)
    commit(store, manifest, newest_epoch_known=2)
    return DurableShard(DurableCheckpoint(store, COMMIT), 0)


def test_a_committed_shard_is_restored_when_no_memory_has_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            durable = committed(MemoryStore())
            here.begin(9, {THERE: there}, 7)

            restore, tier = await here.keeper.prepare(RANK, STEP, "", durable)

            assert tier == "durable"
            (file,) = here.memory.iterdir()
            assert restore.path == str(file)
            index, body = sealed(0, 7, 2)
            assert open_views(index, file.read_bytes()) == open_views(index, body)
            # From now on memory has it: the next restart need not read it again.
            here.begin(10, {THERE: there}, 7)
            assert (await here.keeper.prepare(RANK, STEP, "", durable))[1] == "own"

    asyncio.run(scenario())


def test_the_durable_tier_is_not_read_while_any_memory_has_the_shard(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            tier = DurableTier(str(tmp_path / "store"))
            durable = committed(tier.counts)
            read = tier.reads
            here.stage(0, 7, 2)
            there.stage(1, 7, 2)
            for node in (here, there):
                node.begin(3, {THERE: there}, 7)

            found = [
                (await here.keeper.prepare(rank, STEP, THERE, durable))[1]
                for rank in (RANK, Rank(1))
            ]

            assert found == ["own", "fetched"]
            assert tier.reads == read

    asyncio.run(scenario())


def test_a_durable_shard_that_is_bad_absent_or_of_another_step_is_an_error_of_storage(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            store = FaultyStore(MemoryStore())
            durable = committed(store)
            (key,) = [key for key in store.keys("gen/") if key.endswith("/s0.st")]

            store.flips[key] = 8 * 50_000
            with pytest.raises(ShardCorruptError, match="param/layers"):
                await here.keeper.prepare(RANK, STEP, "", durable)
            store.flips.clear()
            with pytest.raises(ForeignCheckpointError, match="expected step 8"):
                await here.keeper.prepare(RANK, Step(8), "", durable)
            store.delete(key)
            with pytest.raises(BlobNotFoundError):
                await here.keeper.prepare(RANK, STEP, "", durable)

            assert (here.files(), here.keeper.holdings()) == ([], ())

    asyncio.run(scenario())


def test_a_durable_tier_that_does_not_answer_is_given_up_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            store = FaultyStore(MemoryStore())
            durable = committed(store)
            store.slow_s = 0.1
            with pytest.raises(
                StorageUnavailableError,
                match=r"timed out reading it from the durable tier after 0.25 s",
            ):
                await here.keeper.prepare(RANK, STEP, "", durable, timeout_s=0.25)
            await asyncio.sleep(0.4)
            assert here.files() == []

    asyncio.run(scenario())


def test_reads_that_hang_keep_no_memory_from_being_restored_copied_or_freed(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        released = threading.Event()
        async with two(tmp_path) as (here, there):
            store = FaultyStore(MemoryStore())
            durable = committed(store)
            store.before = lambda *_: released.wait(20) and None
            hanging = [
                asyncio.create_task(here.keeper.prepare(Rank(rank), STEP, "", durable))
                for rank in range(1, READS_AT_ONCE + 2)
            ]
            here.stage(0, 7, 2)
            await asyncio.sleep(0.05)
            try:
                assert (await here.keeper.prepare(RANK, STEP, "", timeout_s=5))[1] == "own"
                await here.keeper.copy_to(THERE, RANK, STEP, timeout_s=5)
                there.begin(3, {HERE: here}, 7)
                there.stage(3, 7, 3)
                await here.keeper.prepare(Rank(3), STEP, THERE, timeout_s=5)
                here.stage(0, 8, 2, slot=1)
                here.keeper.retain(Step(8))
                await settled(lambda: not list(here.memory.glob("gone-*")))
                with pytest.raises(StorageUnavailableError, match="timed out reading it from the"):
                    await here.keeper.prepare(Rank(40), STEP, "", durable, timeout_s=0.05)
            finally:
                for task in hanging:
                    task.cancel()
                released.set()
            # Of what was read after all nothing stays: only what was fetched.
            await settled(lambda: len(list(here.memory.glob("restore-*"))) == 1)

    asyncio.run(scenario())


def test_a_shard_whose_verification_hangs_is_dropped_and_looked_for_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            here.stage(0, 7, 2)
            await here.keeper.copy_to(THERE, RANK, STEP)
            with monkeypatch.context() as patch:
                patch.setattr(mending, "look_at_file", lambda *_: released.wait(20))
                with pytest.raises(NotHeldError, match=r"timed out verifying .* after 0.1 s"):
                    await here.keeper.prepare(RANK, STEP, THERE, timeout_s=0.1)
            assert (here.keeper.holdings(), here.held) == ((), [])
            assert (await here.keeper.prepare(RANK, STEP, THERE))[1] == "fetched"
            released.set()

    asyncio.run(scenario())


def test_a_shard_that_was_written_can_be_committed_and_its_receipt_names_it(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            store = MemoryStore()
            here.stage(0, 7, 2)

            receipt, seen = await here.keeper.write(store, RANK, STEP, GENERATION)

            index, _ = sealed(0, 7, 2)
            assert receipt == Receipt(0, index.size, index_digest(index))
            assert (seen.shard, seen.content) == (0, of_index(index).content)
            assert len(store.keys("gen/")) == 2
            with pytest.raises(NotHeldError, match="generation 2, expected 3"):
                await here.keeper.write(store, RANK, STEP, Generation(3))

    asyncio.run(scenario())


def test_a_slot_that_is_being_written_is_freed_only_when_the_write_is_over(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            store = FaultyStore(MemoryStore(), slow_s=0.1)
            here.stage(0, 7, 2)
            writing = asyncio.create_task(here.keeper.write(store, RANK, STEP, GENERATION))
            await asyncio.sleep(0.02)

            here.keeper.retain(Step(8))
            assert here.keeper.holdings() == ()
            assert (here.freed, here.keeper.free_slots(RANK)) == ([], (1, 2))

            await writing
            await asyncio.sleep(0)
            assert (here.freed, here.keeper.free_slots(RANK)) == ([(0, 0)], (0, 1, 2))

    asyncio.run(scenario())


def test_a_write_that_takes_too_long_is_given_up_but_keeps_its_slot_until_it_ends(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            released = threading.Event()
            store = FaultyStore(MemoryStore(), before=lambda *_: released.wait(5) and None)
            here.stage(0, 7, 2)
            with pytest.raises(StorageUnavailableError, match=r"not written after 0.05 s"):
                await here.keeper.write(store, RANK, STEP, GENERATION, timeout_s=0.05)

            here.begin(3, {}, None)
            assert here.keeper.free_slots(RANK) == (1, 2)
            released.set()
            deadline = time.monotonic() + 5
            while here.keeper.free_slots(RANK) != (0, 1, 2):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.005)
            # Later than the generation's seats were named, so it has to be said.
            assert here.freed == [(0, 0)]

    asyncio.run(scenario())


def test_of_each_rank_one_shard_is_written_at_a_time_and_the_next_may_be_let_go(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            released = threading.Event()
            store = FaultyStore(MemoryStore(), before=lambda *_: released.wait(5) and None)
            here.stage(0, 7, 2)
            here.stage(0, 8, 2, slot=1)
            here.stage(0, 9, 2, slot=2)
            writes = [
                asyncio.create_task(here.keeper.write(store, RANK, Step(step), GENERATION))
                for step in (7, 8, 9)
            ]
            await asyncio.sleep(0.05)

            here.keeper.retain(Step(9))
            assert here.keeper.free_slots(RANK) == (1,)
            released.set()
            first, second, third = await asyncio.gather(*writes, return_exceptions=True)

            assert isinstance(first, Written)
            assert isinstance(second, NotHeldError)
            assert isinstance(third, Written)

    asyncio.run(scenario())


def test_a_write_that_was_given_up_and_goes_on_is_not_begun_a_second_time(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            released = threading.Event()
            calls: list[str] = []

            def enter(operation: str, _: str) -> None:
                calls.append(operation)
                released.wait(5)

            store = FaultyStore(MemoryStore(), before=enter)
            here.stage(0, 7, 2)
            with pytest.raises(StorageUnavailableError):
                await here.keeper.write(store, RANK, STEP, GENERATION, timeout_s=0.05)
            with pytest.raises(StorageUnavailableError, match="still has shard of rank 0, step 7"):
                await here.keeper.write_turn(RANK, timeout_s=0.05)
            released.set()

            written = await here.keeper.write(store, RANK, STEP, GENERATION)

            assert written.receipt.shard == 0
            assert calls == ["put", "put"]

    asyncio.run(scenario())


def test_a_full_disk_and_a_damaged_shard_are_errors_of_storage(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            store = FaultyStore(MemoryStore(), full=True)
            here.stage(0, 7, 2)
            with pytest.raises(StorageFullError):
                await here.keeper.write(store, RANK, STEP, GENERATION)
            store.full = False
            here.damage("rank-*")
            with pytest.raises(ShardCorruptError, match="param/layers"):
                await here.keeper.write(store, RANK, STEP, GENERATION)
            assert store.keys() == []

    asyncio.run(scenario())


def test_few_shards_are_written_at_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            at_once, most = 0, 0
            lock = threading.Lock()

            def enter(operation: str, _: str) -> None:
                nonlocal at_once, most
                if operation != "put":
                    return
                with lock:
                    at_once += 1
                    most = max(most, at_once)
                time.sleep(0.01)
                with lock:
                    at_once -= 1

            store = FaultyStore(MemoryStore(), before=enter)
            ranks = [Rank(rank) for rank in range(4)]
            for rank in ranks:
                here.stage(rank, 7, 2)
            await asyncio.gather(
                *(here.keeper.write(store, rank, STEP, GENERATION) for rank in ranks)
            )
            assert most == WRITES_AT_ONCE

    asyncio.run(scenario())


def test_more_than_there_is_room_for_is_refused_before_it_is_taken(tmp_path: Path) -> None:
    with pytest.raises(NoRoomError, match=r"copy needs \d+ bytes of shared memory, \d+ are free"):
        allocate(tmp_path / "copy", 1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_a_file_does_not_get_is_an_error_and_no_signal_later(tmp_path: Path) -> None:
    descriptor = create(tmp_path / "copy", 1 << 20)
    try:
        with pytest.raises(NoRoomError, match=f"{1 << 60} bytes of shared memory"):
            reserve(descriptor, 0, 1 << 60)
        reserve(descriptor, 4096, 8192)
        assert os.fstat(descriptor).st_size == 1 << 20
    finally:
        os.close(descriptor)


def test_a_file_that_finds_no_room_as_it_is_written_says_so(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    there = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(NoRoomError, match="5 bytes of shared memory: No space left"):
            write_all(full, 0, memoryview(b"bytes"))
        write_all(there, 7, memoryview(b"bytes"))
        assert (tmp_path / "copy").read_bytes() == bytes(7) + b"bytes"
    finally:
        os.close(full)
        os.close(there)
