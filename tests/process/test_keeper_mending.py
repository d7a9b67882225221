"""Shards in memory of which some bytes went bad: mended chunk by chunk, or given up."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from orchestrator.agent import mending
from orchestrator.agent.calling import PeerClient
from orchestrator.agent.frames import PICK_BYTES_MAX
from orchestrator.agent.shards import CorruptError
from orchestrator.protocol.messages import Holding
from storage.commit import write_shard
from storage.digest import BLOCK_BYTES
from storage.errors import StorageUnavailableError
from storage.faulty import FaultyStore
from storage.manifest import body_key
from storage.memory import MemoryStore
from tests.shards import (
    HERE,
    OTHER,
    RANK,
    STEP,
    THERE,
    Clock,
    Heard,
    Node,
    chunks,
    content,
    picked,
    sealed,
    settled,
    spoil,
    two,
)

pytestmark = pytest.mark.process


async def copied(here: Node) -> Heard:
    """Stage a shard here, and have a copy there."""
    here.stage(0, 7, 2)
    await here.keeper.copy_to(THERE, RANK, STEP)
    return Heard(here)


@pytest.mark.parametrize("piece", [PICK_BYTES_MAX, 5000])
def test_a_chunk_that_went_bad_in_memory_comes_from_the_buddy_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    pieces = picked(monkeypatch)
    monkeypatch.setattr(mending, "PICK_BYTES_MAX", piece)

    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            heard = await copied(here)
            bad = chunks()[3]
            path = spoil(here, bad.start + 5)
            here.begin(3, {HERE: here, THERE: there}, 7)

            restore, tier = await here.keeper.prepare(RANK, STEP, HERE)

            assert (tier, restore.path) == ("own", str(path))
            assert path.read_bytes() == sealed(0, 7, 2)[1]
            assert here.keeper.holdings() == (Holding(RANK, STEP),)
            (copy,) = heard.mended
            assert (copy.rank, copy.origin, copy.chunks, copy.size) == (RANK, THERE, 1, bad.size)
            assert f"index says {bad.xxh3_128}: {bad.name}" in copy.what
            assert heard.lacking == []
            places = range(bad.start, bad.end, piece)
            assert pieces == [(place, min(piece, bad.end - place)) for place in places]

    asyncio.run(scenario())


def test_two_copies_that_are_bad_in_different_chunks_make_one_that_is_whole(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            heard = await copied(here)
            path = spoil(here, chunks()[1].start, chunks()[6].start)
            spoil(there, chunks()[2].start)

            assert (await here.keeper.prepare(RANK, STEP, HERE))[1] == "own"

            assert path.read_bytes() == sealed(0, 7, 2)[1]
            assert [(copy.origin, copy.chunks) for copy in heard.mended] == [(THERE, 2)]

    asyncio.run(scenario())


def test_what_is_bad_in_both_memories_comes_from_the_durable_tier(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            store = here.keeper.checking.store = MemoryStore()
            write_shard(store, *sealed(0, 7, 2))
            heard = await copied(here)
            path = spoil(here, chunks()[1].start, chunks()[6].start)
            spoil(there, chunks()[6].end - 1)

            assert (await here.keeper.prepare(RANK, STEP, HERE))[1] == "own"

            assert path.read_bytes() == sealed(0, 7, 2)[1]
            assert [(copy.origin, copy.chunks) for copy in heard.mended] == [(THERE, 1), ("", 1)]
            # So that somebody gives the other node a good one.
            (bad,) = heard.lacking
            assert (bad.node, bad.rank, bad.step) == (THERE, RANK, STEP)
            assert f"index says {chunks()[6].xxh3_128}: {chunks()[6].name}" in bad.what

    asyncio.run(scenario())


async def held_up(patch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Have whoever picks bytes wait; return what says that one does, and what lets it go on."""
    waits, go_on = asyncio.Event(), asyncio.Event()
    pick = PeerClient.pick

    async def gated(self: PeerClient, *wanted: Any) -> bytes:
        waits.set()
        await go_on.wait()
        return await pick(self, *wanted)

    patch.setattr(PeerClient, "pick", gated)
    return waits, go_on


@pytest.mark.parametrize("second", ["asks for it", "finds it damaged", "has it copied"])
def test_who_looks_at_a_shard_that_is_being_mended_waits_for_the_one_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            heard = await copied(here)
            path = spoil(here, chunks()[2].start)
            waits, go_on = await held_up(monkeypatch)
            first = asyncio.create_task(here.keeper.prepare(RANK, STEP, HERE))
            await waits.wait()
            keeper, shard = here.keeper, here.keeper._shelf.require(RANK, STEP)
            other = asyncio.create_task(
                {
                    "asks for it": lambda: keeper.prepare(RANK, STEP, HERE),
                    "finds it damaged": lambda: keeper._server._checking.verified(shard),
                    "has it copied": lambda: keeper.prepare(OTHER, STEP, HERE, staged_as=RANK),
                }[second]()  # type: ignore[arg-type]
            )
            await settled(lambda: keeper.checking._looks._under_way[shard].waiting == 2)

            go_on.set()
            assert (await first)[1] == "own"
            await other

            assert path.read_bytes() == sealed(0, 7, 2)[1]
            assert Holding(RANK, STEP) in keeper.holdings()
            assert [(copy.origin, copy.chunks) for copy in heard.mended] == [(THERE, 1)]

    asyncio.run(scenario())


def test_a_look_goes_on_as_long_as_anybody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            await copied(here)
            path = spoil(here, chunks()[2].start)
            waits, go_on = await held_up(monkeypatch)
            first, other = (
                asyncio.create_task(here.keeper.prepare(RANK, STEP, HERE)) for _ in range(2)
            )
            await waits.wait()
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            go_on.set()

            assert (await other)[1] == "own"
            assert path.read_bytes() == sealed(0, 7, 2)[1]

    asyncio.run(scenario())


def test_what_another_replica_staged_is_mended_and_then_copied(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            heard = await copied(here)
            spoil(here, chunks()[2].start)

            restore, tier = await here.keeper.prepare(OTHER, STEP, HERE, staged_as=RANK)

            assert tier == "own"
            assert content(restore) == sealed(0, 7, 2)[1]
            assert set(here.keeper.holdings()) == {Holding(RANK, STEP), Holding(OTHER, STEP)}
            assert [(copy.origin, copy.chunks) for copy in heard.mended] == [(THERE, 1)]

    asyncio.run(scenario())


def test_a_mend_that_takes_too_long_is_given_up_and_what_it_mended_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick = PeerClient.pick
    clock = Clock()

    async def slow(self: PeerClient, *wanted: Any) -> bytes:
        clock.ahead_s += 240
        await asyncio.sleep(0)
        return await pick(self, *wanted)

    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            heard = await copied(here)
            spoil(here, *(chunk.start for chunk in chunks()))
            monkeypatch.setattr(PeerClient, "pick", slow)
            monkeypatch.setattr(mending, "READ_WITHIN_S", 600.0)
            here.keeper.checking.mend_s = 600.0
            clock.start()

            with pytest.raises(CorruptError, match="8 such are not all mended after 600 s"):
                await here.keeper.prepare(RANK, STEP, HERE, timeout_s=6000)

            assert here.keeper.holdings() == ()
            assert [(copy.origin, copy.chunks) for copy in heard.mended] == [(THERE, 2)]
            # What is late says nothing of the copy there.
            assert heard.lacking == []

    asyncio.run(scenario())


def test_what_is_bad_everywhere_is_named_and_the_shard_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            store = FaultyStore(MemoryStore())
            write_shard(store, *sealed(0, 7, 2))
            bad = chunks()[6]
            store.flips[body_key(7, 2, 0)] = 8 * bad.start
            here.keeper.checking.store = store
            heard = await copied(here)
            spoil(here, bad.start)
            spoil(there, bad.start)

            with pytest.raises(CorruptError, match=rf"{bad.name} of shard 0 of step 7"):
                await here.keeper.prepare(RANK, STEP, HERE)

            assert (here.keeper.holdings(), here.held, heard.mended) == ((), [], [])

    asyncio.run(scenario())


def test_a_shard_of_several_blocks_is_the_same_one_on_the_durable_tier(tmp_path: Path) -> None:
    """What was written has sums of blocks that what was staged has not."""
    size = BLOCK_BYTES + (1 << 20)

    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            here.keeper.checking.store = MemoryStore()
            index, body = sealed(0, 7, 2, size=size)
            write_shard(here.keeper.checking.store, index, body)
            here.stage(0, 7, 2, size=size)
            path = spoil(here, index.chunks[0].start)

            assert (await here.keeper.prepare(RANK, STEP, HERE))[1] == "own"

            assert path.read_bytes() == body

    asyncio.run(scenario())


def test_another_shard_of_that_step_on_the_durable_tier_mends_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            here.keeper.checking.store = MemoryStore()
            index, body = sealed(0, 7, 2, size=60_000)
            write_shard(here.keeper.checking.store, index, body)
            here.stage(0, 7, 2)
            spoil(here, chunks()[1].start)

            with pytest.raises(CorruptError):
                await here.keeper.prepare(RANK, STEP, HERE)

    asyncio.run(scenario())


def test_a_header_that_went_bad_is_made_anew_also_beside_a_bad_chunk(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            heard = await copied(here)
            path = spoil(here, 20)
            assert (await here.keeper.prepare(RANK, STEP, HERE))[1] == "own"
            assert path.read_bytes() == sealed(0, 7, 2)[1]
            here.begin(3, {THERE: there}, 7)
            spoil(here, 30, chunks()[0].start)
            assert (await here.keeper.prepare(RANK, STEP, HERE))[1] == "own"
            assert path.read_bytes() == sealed(0, 7, 2)[1]

            assert [copy.origin for copy in heard.mended] == ["here", THERE, "here"]

    asyncio.run(scenario())


@pytest.mark.parametrize("pieces", range(4))
def test_who_is_stopped_between_any_two_pieces_leaves_a_shard_that_is_mended_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    pick = PeerClient.pick

    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            await copied(here)
            path = spoil(here, *(chunks()[number].start for number in (0, 3, 5)))
            stopped, left = asyncio.Event(), pieces

            async def until(self: PeerClient, *wanted: Any) -> bytes:
                nonlocal left
                left -= 1
                if left < 0:
                    stopped.set()
                    await asyncio.sleep(60)
                return await pick(self, *wanted)

            with monkeypatch.context() as patch:
                patch.setattr(PeerClient, "pick", until)
                preparing = asyncio.create_task(here.keeper.prepare(RANK, STEP, HERE))
                if pieces < 3:
                    await stopped.wait()
                    preparing.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await preparing
                else:
                    await preparing
            shard = here.keeper._shelf.require(RANK, STEP)
            await settled(lambda: shard.pins == (0 if pieces < 3 else 1))
            assert (path.read_bytes() == sealed(0, 7, 2)[1]) is (pieces == 3)

            assert (await here.keeper.prepare(RANK, STEP, HERE))[1] == "own"
            assert path.read_bytes() == sealed(0, 7, 2)[1]

    asyncio.run(scenario())


def test_a_store_that_fails_at_any_of_its_operations_leaves_the_shard_to_the_next_attempt(
    tmp_path: Path,
) -> None:
    """A shard is dropped that can not be mended; nothing that is damaged is ever restored from."""

    async def scenario(fail_at: int) -> bool:
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        calls = 0

        def before(operation: str, key: str) -> None:
            nonlocal calls
            calls += 1
            if calls > fail_at:
                raise StorageUnavailableError(f"{operation} {key}")

        async with two(folder) as (here, _):
            store = FaultyStore(MemoryStore())
            write_shard(store, *sealed(0, 7, 2))
            store.before = before
            here.keeper.checking.store = store
            here.stage(0, 7, 2)
            path = spoil(here, chunks()[1].start, chunks()[6].start)
            try:
                await here.keeper.prepare(RANK, STEP, HERE)
            except CorruptError:
                assert here.keeper.holdings() == ()
                return False
            assert path.read_bytes() == sealed(0, 7, 2)[1]
            return True

    outcomes = [asyncio.run(scenario(fail_at)) for fail_at in range(5)]
    # The index is read once, and then each of the two chunks.
    assert outcomes == [False] * 3 + [True] * 2


def test_bytes_of_a_shard_are_served_to_who_asks_for_them_and_no_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            there.stage(0, 7, 2)
            body = sealed(0, 7, 2)[1]
            pick = here.keeper._client.pick

            assert await pick(there.address, (RANK, STEP), 4090, 20) == body[4090:4110]
            with pytest.raises(CorruptError, match=f"has 4 of 20 bytes from {len(body) - 4} on"):
                await pick(there.address, (RANK, STEP), len(body) - 4, 20)

    asyncio.run(scenario())
