"""Copies that are pushed to another node and come damaged: mended chunk by chunk, or refused."""

import asyncio
from pathlib import Path

import pytest

from orchestrator.agent.shards import CorruptError, MalformedError
from orchestrator.agent.wire import Wire
from orchestrator.protocol.ids import Step
from orchestrator.protocol.messages import Holding
from storage.commit import write_shard
from storage.memory import MemoryStore
from tests.shards import (
    GENERATION,
    HERE,
    RANK,
    STEP,
    THERE,
    Heard,
    calling,
    chunks,
    damaged_on_the_way,
    sealed,
    spoil,
    two,
)
from tests.speaking import BODY, DONE, INDEX, READY, End, answering, pick

pytestmark = pytest.mark.process


def sent(patch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the size of everything that is sent out of a file will be added."""
    sizes: list[int] = []
    send = Wire.send_file

    async def counted(self: Wire, descriptor: int, size: int, start: int = 0) -> None:
        sizes.append(size)
        await send(self, descriptor, size, start)

    patch.setattr(Wire, "send_file", counted)
    return sizes


@pytest.mark.parametrize("bytes_per_s", [None, 1e9])
def test_of_a_copy_that_is_damaged_on_the_way_only_what_is_bad_is_sent_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_per_s: float | None
) -> None:
    bad = chunks()[3]
    sizes = sent(monkeypatch)

    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            heard = Heard(there)
            here.stage(RANK, 7, 2)
            with damaged_on_the_way(monkeypatch, bad.start + 5):
                await here.keeper.copy_to(THERE, RANK, STEP, bytes_per_s=bytes_per_s)

            assert sizes == [len(BODY), bad.size]
            assert there.held == [(GENERATION, RANK, STEP)]
            (copy,) = there.memory.iterdir()
            assert copy.read_bytes() == sealed(RANK, 7, 2)[1]
            (mended,) = heard.mended
            assert (mended.rank, mended.origin, mended.sender) == (RANK, HERE, HERE)
            assert (mended.chunks, mended.size) == (1, bad.size)
            assert heard.lacking == []
            # The same connection takes what comes next.
            here.stage(RANK, 8, 2, slot=1)
            await here.keeper.copy_to(THERE, RANK, Step(8))
            assert there.keeper.holdings() == (Holding(RANK, STEP), Holding(RANK, Step(8)))

    asyncio.run(scenario())


def test_a_node_that_knows_nobody_has_what_came_damaged_from_who_pushed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            there.begin(GENERATION, {}, None)
            here.stage(RANK, 7, 2)
            # Of all that is in it: the header, and two of its chunks.
            with damaged_on_the_way(monkeypatch, 9, chunks()[0].start, chunks()[-1].start):
                await here.keeper.copy_to(THERE, RANK, STEP)

            (copy,) = there.memory.iterdir()
            assert copy.read_bytes() == sealed(RANK, 7, 2)[1]

    asyncio.run(scenario())


def test_what_is_bad_at_who_pushes_it_comes_from_the_durable_tier_and_is_told(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            heard = Heard(there)
            store = there.keeper.checking.store = MemoryStore()
            write_shard(store, *sealed(RANK, 7, 2))
            here.stage(RANK, 7, 2)
            spoil(here, chunks()[6].start)

            await here.keeper.copy_to(THERE, RANK, STEP)

            (copy,) = there.memory.iterdir()
            assert copy.read_bytes() == sealed(RANK, 7, 2)[1]
            (mended,) = heard.mended
            assert (mended.origin, mended.sender, mended.chunks) == ("", HERE, 1)
            assert [(bad.node, bad.rank, bad.step) for bad in heard.lacking] == [(HERE, RANK, STEP)]

    asyncio.run(scenario())


def test_what_is_bad_everywhere_is_refused_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sent(monkeypatch)

    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(RANK, 7, 2)
            spoil(here, chunks()[6].start)

            with pytest.raises(CorruptError, match=chunks()[6].name):
                await here.keeper.copy_to(THERE, RANK, STEP)

            assert sizes == [len(BODY), chunks()[6].size], "asked once more, and not twice"
            assert (there.files(), there.keeper.holdings()) == ([], ())

    asyncio.run(scenario())


def test_who_takes_a_copy_gets_pieces_of_it_and_of_nothing_else(tmp_path: Path) -> None:
    pieces: list[bytes] = []

    async def take(end: End) -> None:
        assert (await end.hear())["sender"] == ""
        await end.send(READY)
        await end.read(len(INDEX) + len(BODY))
        for start, size in ((4096, 100), (len(BODY) - 8, 8)):
            await end.send(pick(start, size))
            assert (await end.hear())["type"] == "Piece"
            pieces.append(await end.read(size))
        await end.send(pick(len(BODY) - 8, 9))
        await end.send(DONE)

    async def scenario() -> None:
        async with answering(take) as (address, _), calling(tmp_path, address) as node:
            with pytest.raises(MalformedError, match=rf"offered was .*, {len(BODY)} bytes"):
                await node.keeper.copy_to(THERE, RANK, STEP, timeout_s=10)

        assert pieces == [BODY[4096:4196], BODY[-8:]]

    asyncio.run(scenario())
