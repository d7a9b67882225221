"""Copies elsewhere that were found bad: replaced when ranks train again, without a hurry."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.agent import links
from orchestrator.agent.calling import PeerClient
from orchestrator.agent.nursery import Nursery
from orchestrator.agent.ranks import Ranks
from orchestrator.agent.saving import REPAIR_BYTES_PER_S, Saving
from orchestrator.protocol.ids import Rank
from orchestrator.protocol.messages import BadCopy, Begin, Fact, Holding, LinkTimed
from tests.shards import GENERATION, HERE, RANK, STEP, THERE, Node, settled, stage, two

pytestmark = pytest.mark.process

RANKS = (RANK, Rank(1))


@contextlib.asynccontextmanager
async def resumed(
    tmp_path: Path, say: Callable[[Fact], None] = lambda _: None
) -> AsyncIterator[tuple[Node, Node, Saving]]:
    """A node whose ranks train again, of whose shards the buddy was found to have bad copies."""
    work = tmp_path / "work"
    work.mkdir()
    async with two(tmp_path) as (here, there):
        for rank in RANKS:
            here.stage(rank, STEP, GENERATION)
        nursery = Nursery("tests.programs.steps:main", work / "nursery.log")
        ranks = Ranks(nursery, memory=work, idle_log=work / "parked.log")
        saving = Saving(HERE, ranks, here.keeper, say)
        saving.begin(
            Begin(
                order="b",
                generation=GENERATION,
                world_size=2,
                ranks=RANKS,
                seats=(HERE, HERE),
                buddies={HERE: THERE},
                peers={HERE: here.address, THERE: there.address},
                restore=STEP,
                sources=(HERE, HERE),
                shard_of=(0, 1),
                writers=RANKS,
            )
        )
        for rank in RANKS:
            for hear in here.keeper.checking.on_lacking:
                hear(BadCopy(THERE, rank, STEP, "it is no good"))
        yield here, there, saving


def test_a_node_replaces_bad_copies_one_after_the_other_at_one_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = PeerClient.send
    under_way: list[Rank] = []
    most = 0

    async def watched(self: PeerClient, address: str, shard: Any, *more: Any, **rate: Any) -> None:
        nonlocal most
        assert rate["bytes_per_s"] == REPAIR_BYTES_PER_S
        under_way.append(shard.rank)
        most = max(most, len(under_way))
        await send(self, address, shard, *more, **rate)
        under_way.remove(shard.rank)

    monkeypatch.setattr(PeerClient, "send", watched)

    async def scenario() -> None:
        async with resumed(tmp_path) as (_, there, saving):
            saving.resumed()
            await settled(lambda: not saving._tasks)

            assert there.held == [(GENERATION, rank, STEP) for rank in RANKS]
            assert most == 1

    asyncio.run(scenario())


def test_a_bad_copy_that_can_not_be_replaced_is_not_sent_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = PeerClient.send
    sent: list[Rank] = []

    async def counted(self: PeerClient, address: str, shard: Any, *more: Any, **rate: Any) -> None:
        sent.append(shard.rank)
        await send(self, address, shard, *more, **rate)

    monkeypatch.setattr(PeerClient, "send", counted)

    async def scenario() -> None:
        async with resumed(tmp_path) as (_, there, saving):
            there.keeper.unreachable = True
            saving.resumed()
            await settled(lambda: not saving._tasks)

            assert sent == list(RANKS)
            assert there.held == []

    asyncio.run(scenario())


def test_a_copy_that_came_in_place_of_another_is_told_to_be_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with resumed(tmp_path) as (here, there, saving):
            await here.keeper.copy_to(THERE, RANK, STEP)
            assert there.keeper.renewed() == ()

            saving.resumed()
            await settled(lambda: not saving._tasks)

            assert there.keeper.renewed() == (Holding(RANK, STEP),), "rank 1 had none before"
            assert there.keeper.holdings() == tuple(Holding(rank, STEP) for rank in RANKS)

    asyncio.run(scenario())


def test_how_fast_what_is_staged_reaches_the_buddy_is_told_and_a_fault_plan_can_drag_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "LEAST_BYTES", 1)
    said: list[Fact] = []
    size = 0

    async def slowly(_self: PeerClient, _to: str, shard: Any, *_more: Any, **_rate: Any) -> None:
        nonlocal size
        size = shard.size
        await asyncio.sleep(0.01)

    monkeypatch.setattr(PeerClient, "send", slowly)

    async def scenario() -> None:
        async with resumed(tmp_path, said.append) as (here, _, saving):
            here.keeper.drag = 5.0
            for step in range(1, links.COPIES + 1):
                staged = stage(here.memory, RANK, STEP + step, GENERATION)
                here.keeper.staged(RANK, staged)
                saving.save(RANK, staged)
                await settled(lambda: not saving._tasks)

    asyncio.run(scenario())

    (told,) = said
    assert isinstance(told, LinkTimed)
    assert (told.generation, told.to, told.copies) == (GENERATION, THERE, links.COPIES)
    # It takes no less than it has to; how much more is the machine's business.
    assert 0 < told.bytes_per_s <= size / (5 * 0.01)
