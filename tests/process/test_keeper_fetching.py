"""Shards that another node's memory has and that come damaged: mended on arrival, or refused."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from orchestrator.agent.calling import PeerClient
from orchestrator.agent.shards import CorruptError, UnreachableError
from orchestrator.protocol.messages import Holding
from storage.commit import write_shard
from storage.errors import StorageUnavailableError
from storage.faulty import FaultyStore
from storage.memory import MemoryStore
from tests.shards import (
    OTHER,
    RANK,
    STEP,
    THERE,
    Heard,
    Node,
    chunks,
    content,
    damaged_on_the_way,
    picked,
    sealed,
    settled,
    spoil,
    two,
)

pytestmark = pytest.mark.process


def test_of_a_shard_that_is_damaged_on_the_way_only_what_is_bad_comes_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, bad = picked(monkeypatch), chunks()[3]

    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            heard = Heard(here)
            there.stage(RANK, 7, 2)
            here.begin(3, {THERE: there}, 7)
            with damaged_on_the_way(monkeypatch, bad.start + 5):
                restore, tier = await here.keeper.prepare(RANK, STEP, THERE)

            assert tier == "fetched"
            assert content(restore) == sealed(RANK, 7, 2)[1]
            assert pieces == [(bad.start, bad.size)]
            (copy,) = heard.mended
            assert (copy.rank, copy.origin, copy.sender) == (RANK, THERE, THERE)
            assert (copy.chunks, copy.size) == (1, bad.size)
            assert f"index says {bad.xxh3_128}: {bad.name}" in copy.what
            # Who has it whole is not taken to lack it.
            assert heard.lacking == []
            assert there.keeper.holdings() == (Holding(RANK, STEP),)

    asyncio.run(scenario())


def test_what_another_replica_staged_is_mended_under_its_name_and_held_under_the_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            there.stage(OTHER, 7, 2)
            here.begin(3, {THERE: there}, 7)
            with damaged_on_the_way(monkeypatch, chunks()[3].start, 9):
                restore, tier = await here.keeper.prepare(RANK, STEP, THERE, staged_as=OTHER)

            assert tier == "fetched"
            assert content(restore) == sealed(OTHER, 7, 2)[1]
            assert here.keeper.holdings() == (Holding(RANK, STEP),)

    asyncio.run(scenario())


def test_what_is_bad_where_it_comes_from_is_had_from_the_durable_tier_chunk_by_chunk(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            heard = Heard(here)
            store = here.keeper.checking.store = MemoryStore()
            write_shard(store, *sealed(RANK, 7, 2))
            there.stage(RANK, 7, 2)
            spoil(there, chunks()[6].start)
            here.begin(3, {THERE: there}, 7)

            restore, tier = await here.keeper.prepare(RANK, STEP, THERE)

            assert tier == "fetched"
            assert content(restore) == sealed(RANK, 7, 2)[1]
            assert [(copy.origin, copy.sender, copy.chunks) for copy in heard.mended] == [
                ("", THERE, 1)
            ]
            # Its holder looked at it, and says itself that it has it no more.
            assert (there.keeper.holdings(), there.held) == ((), [])

    asyncio.run(scenario())


def test_what_is_damaged_on_the_way_again_and_again_is_no_fault_of_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick = PeerClient.pick

    async def damaged(self: PeerClient, *wanted: Any) -> bytes:
        return bytes(len(await pick(self, *wanted)))

    monkeypatch.setattr(PeerClient, "pick", damaged)

    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            there.stage(RANK, 7, 2)
            here.begin(3, {THERE: there}, 7)
            with (
                damaged_on_the_way(monkeypatch, chunks()[3].start),
                pytest.raises(UnreachableError, match=r"intact at .*, and not here: .*xxh3-128"),
            ):
                await here.keeper.prepare(RANK, STEP, THERE)

            assert (here.files(), here.keeper.holdings()) == ([], ())
            assert there.keeper.holdings() == (Holding(RANK, STEP),)

    asyncio.run(scenario())


@pytest.mark.parametrize("pieces", range(3))
def test_who_is_stopped_between_any_two_pieces_leaves_nothing_of_what_came_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    pick = PeerClient.pick

    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            there.stage(RANK, 7, 2)
            here.begin(3, {THERE: there}, 7)
            stopped, left = asyncio.Event(), pieces

            async def until(self: PeerClient, *wanted: Any) -> bytes:
                nonlocal left
                left -= 1
                if left < 0:
                    stopped.set()
                    await asyncio.sleep(60)
                return await pick(self, *wanted)

            places = [chunks()[number].start for number in (0, 3, 5)]
            with monkeypatch.context() as patch, damaged_on_the_way(monkeypatch, *places):
                patch.setattr(PeerClient, "pick", until)
                preparing = asyncio.create_task(here.keeper.prepare(RANK, STEP, THERE))
                await stopped.wait()
                preparing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await preparing
            await settled(lambda: here.files() == [])
            assert here.keeper.holdings() == ()

            assert (await here.keeper.prepare(RANK, STEP, THERE))[1] == "fetched"

    asyncio.run(scenario())


def test_a_store_that_fails_at_any_of_its_operations_has_what_came_damaged_refused(
    tmp_path: Path,
) -> None:
    async def fetched(here: Node, there: Node, fail_at: int) -> bool:
        calls = 0

        def before(operation: str, key: str) -> None:
            nonlocal calls
            calls += 1
            if calls > fail_at:
                raise StorageUnavailableError(f"{operation} {key}")

        store = FaultyStore(MemoryStore())
        write_shard(store, *sealed(RANK, 7, 2))
        store.before = before
        here.keeper.checking.store = store
        there.stage(RANK, 7, 2)
        spoil(there, chunks()[1].start, chunks()[6].start)
        here.begin(3, {THERE: there}, 7)
        try:
            restore, _ = await here.keeper.prepare(RANK, STEP, THERE)
        except CorruptError:
            assert (here.files(), here.keeper.holdings()) == ([], ())
            return False
        assert content(restore) == sealed(RANK, 7, 2)[1]
        return True

    async def scenario(fail_at: int) -> bool:
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        async with two(folder) as nodes:
            return await fetched(*nodes, fail_at)

    # The index is read once, and then each of the two chunks.
    assert [asyncio.run(scenario(n)) for n in range(4)] == [False, False, False, True]
