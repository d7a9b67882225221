"""Calls to other agents: which lie, stall or are cut off, and whose connections are kept."""

import asyncio
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from orchestrator.agent import peers
from orchestrator.agent.keeper import Keeper
from orchestrator.agent.shards import (
    CorruptError,
    KeeperError,
    MalformedError,
    NoRoomError,
    NotHeldError,
    StaleError,
    UnreachableError,
)
from orchestrator.protocol.ids import Rank
from tests.shards import GENERATION, RANK, STEP, THERE, TOKEN, Node, calling, settled, two
from tests.speaking import BODY, DONE, INDEX, READY, End, answering, call, frame, greet, offer

pytestmark = pytest.mark.process


def failed(kind: str) -> bytes:
    return frame({"type": "Failed", "kind": kind, "reason": "for a reason"})


THEIRS = Rank(1)
"""The rank whose shard is fetched; the peers of the tests offer INDEX and BODY as its."""


def offered(**changes: object) -> bytes:
    return offer(**{"rank": 1, "lineage": None} | changes)


LIES: dict[str, tuple[bytes, type[KeeperError], str]] = {
    "another rank": (offered(rank=0), MalformedError, "wanted"),
    "another step": (offered(step=8), MalformedError, "wanted"),
    "no offer": (READY, MalformedError, "expected Offer"),
    "garbage": (b"\xff" * 100, MalformedError, "may have 4096"),
    "a huge index": (offered(index_bytes=1 << 40), MalformedError, "may have"),
    "a huge body": (offered(body_bytes=1 << 60), NoRoomError, "restore-00001-7"),
    "a longer body": (
        offered(body_bytes=len(BODY) + 1) + INDEX + BODY + b"x",
        MalformedError,
        "offered were",
    ),
    "another body": (offered() + INDEX + BODY[::-1], CorruptError, "xxh3-128"),
    "a short body": (offered() + INDEX + BODY[:-1], UnreachableError, "hung up after"),
    "half an index": (offered() + INDEX[:9], UnreachableError, "hung up after 9 of"),
    "half an offer": (offered()[:9], UnreachableError, "hung up after"),
    "nothing": (b"", UnreachableError, "hung up after 0 of 4 bytes"),
    "an error": (failed("NotHeldError"), NotHeldError, r"127.0.0.1:\d+: for a reason"),
    "an error of its own": (failed("SystemExit"), KeeperError, "for a reason"),
}


@pytest.mark.parametrize("how", LIES)
def test_a_peer_that_lies_about_a_shard_is_not_believed(tmp_path: Path, how: str) -> None:
    said, kind, reason = LIES[how]

    async def lie(end: End) -> None:
        await end.hear()
        await end.send(said)
        end.socket.shutdown(socket.SHUT_WR)
        await end.hung_up()

    async def scenario() -> None:
        async with answering(lie) as (address, _), calling(tmp_path, address) as node:
            with pytest.raises(kind, match=reason) as caught:
                await node.keeper.prepare(THEIRS, STEP, THERE, timeout_s=5)
            assert type(caught.value) is kind

    asyncio.run(scenario())


def test_a_shard_that_comes_damaged_from_who_has_it_intact_is_not_held_against_that_one(
    tmp_path: Path,
) -> None:
    async def damage_on_the_way(end: End) -> None:
        await end.hear()
        await end.send(offered() + INDEX + BODY[::-1])
        await end.hear()
        assert (await end.hear())["type"] == "Failed"
        await end.send(DONE)
        assert (await end.hear())["type"] == "Pick"
        await end.send(failed("NotHeldError"))

    async def scenario() -> None:
        async with (
            answering(damage_on_the_way) as (address, _),
            calling(tmp_path, address) as node,
        ):
            with pytest.raises(UnreachableError, match=r"intact at .*, and not here: .*xxh3-128"):
                await node.keeper.prepare(THEIRS, STEP, THERE, timeout_s=5)

    asyncio.run(scenario())


def test_who_refuses_in_the_middle_of_a_body_is_heard_and_not_asked_again(tmp_path: Path) -> None:
    async def refuse(end: End) -> None:
        await end.hear()
        await end.send(READY)
        await end.read(1_000_000)
        await end.send(failed("StaleError"))

    async def scenario() -> None:
        async with (
            answering(refuse) as (address, callers),
            calling(tmp_path, address, 40_000_000) as node,
        ):
            with pytest.raises(StaleError, match=r"127.0.0.1:\d+: for a reason"):
                await node.keeper.copy_to(THERE, RANK, STEP, timeout_s=5)
            assert len(callers) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(("rate", "times"), [(None, 3), (1e9, 1)])
def test_a_copy_that_breaks_off_is_sent_again_unless_it_is_held_back_for_the_sake_of_others(
    tmp_path: Path, rate: float | None, times: int
) -> None:
    async def break_off(end: End) -> None:
        await end.hear()
        await end.send(READY)
        await end.read(10_000)

    async def scenario() -> None:
        async with answering(break_off) as (address, callers), calling(tmp_path, address) as node:
            with pytest.raises(UnreachableError):
                await node.keeper.copy_to(THERE, RANK, STEP, timeout_s=30, bytes_per_s=rate)
            assert len(callers) == times

    asyncio.run(scenario())


def test_a_repair_to_who_hangs_up_before_it_is_ready_is_tried_again(tmp_path: Path) -> None:
    async def hang_up(end: End) -> None:
        await end.hear()

    async def scenario() -> None:
        async with answering(hang_up) as (address, callers), calling(tmp_path, address) as node:
            with pytest.raises(UnreachableError):
                await node.keeper.copy_to(THERE, RANK, STEP, timeout_s=30, bytes_per_s=1e9)
            assert len(callers) == 3

    asyncio.run(scenario())


async def hang(_: End) -> None:
    await asyncio.sleep(60)


async def hang_after_half_a_copy(end: End) -> None:
    await end.hear()
    await end.send(READY)
    await end.read(20_000_000)
    await hang(end)


async def hang_after_half_a_fetch(end: End) -> None:
    await end.hear()
    await end.send(offered(), INDEX, BODY[:1000])
    await hang(end)


@pytest.mark.parametrize("stall", [hang, hang_after_half_a_copy, hang_after_half_a_fetch])
@pytest.mark.parametrize("ended_by", ["time", "cut off"])
def test_what_stalls_ends_in_time_and_at_once_when_this_node_is_cut_off(
    tmp_path: Path, stall: object, ended_by: str
) -> None:
    cut = ended_by == "cut off"

    async def scenario() -> None:
        async with (
            answering(stall) as (address, callers),  # type: ignore[arg-type]
            calling(tmp_path, address, 40_000_000) as node,
        ):
            work = (
                node.keeper.prepare(THEIRS, STEP, THERE, timeout_s=30 if cut else 0.3)
                if stall is hang_after_half_a_fetch
                else node.keeper.copy_to(THERE, RANK, STEP, timeout_s=30 if cut else 0.3)
            )
            begun = time.monotonic()
            task = asyncio.create_task(work)
            await settled(lambda: bool(callers))
            await asyncio.sleep(0.1)
            node.keeper.unreachable = cut
            with pytest.raises(UnreachableError, match="cut off" if cut else "0.3 s"):
                await task
            assert time.monotonic() - begun < 10

    asyncio.run(scenario())


def test_a_node_that_becomes_cut_off_breaks_off_what_others_are_sending(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            end = await greet(there.address, offer(), INDEX, BODY[:1000])
            assert await end.hear() == {"type": "Ready"}
            assert there.files() != []
            there.keeper.unreachable = True

            await settled(lambda: there.files() == [])
            await end.hung_up()
            end.close()

    asyncio.run(scenario())


def test_room_that_is_made_after_a_call_was_given_up_goes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, made = threading.Event(), threading.Event()
    allocate = os.posix_fallocate

    def take_long(descriptor: int, offset: int, size: int) -> None:
        making.set()
        assert made.wait(10)
        allocate(descriptor, offset, size)

    async def scenario() -> None:
        async with (
            answering(hang_after_half_a_fetch) as (address, _),
            calling(tmp_path, address) as node,
        ):
            monkeypatch.setattr(os, "posix_fallocate", take_long)
            fetching = asyncio.create_task(node.keeper.prepare(THEIRS, STEP, THERE))
            await settled(making.is_set)
            fetching.cancel()
            await asyncio.wait([fetching])
            assert len(node.files()) == 2
            made.set()
            await settled(lambda: len(node.files()) == 1)

    asyncio.run(scenario())


# Connections ----------------------------------------------------------------------------------


def test_a_connection_is_kept_for_the_next_call(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            there.stage(1, 7, 2)
            await here.keeper.copy_to(THERE, RANK, STEP)
            (wire,) = there.keeper._server._callers
            await here.keeper.copy_to(THERE, RANK, STEP)
            assert (await here.keeper.prepare(THEIRS, STEP, THERE))[1] == "fetched"
            assert list(there.keeper._server._callers) == [wire]
            (own,) = here.keeper._client._idle
            for end in (wire, own):
                assert end._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    asyncio.run(scenario())


def test_of_many_connections_only_some_are_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            copies = (here.keeper.copy_to(THERE, RANK, STEP) for _ in range(30))
            await asyncio.gather(*copies)
            assert len(here.keeper._client._idle) == 16
            await settled(lambda: len(there.keeper._server._callers) == 16)

    asyncio.run(scenario())


async def hold(end: End) -> None:
    """Take one copy."""
    told = await end.hear()
    await end.send(READY)
    await end.read(told["index_bytes"] + told["body_bytes"])
    await end.send(DONE)


async def hold_and_hang_up_when_called_again(end: End) -> None:
    await hold(end)
    await end.hear()


def test_a_kept_connection_that_dies_when_it_is_used_is_made_anew(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            answering(hold_and_hang_up_when_called_again, hold) as (address, callers),
            calling(tmp_path, address) as node,
        ):
            await node.keeper.copy_to(THERE, RANK, STEP)
            assert len(callers) == 1
            await node.keeper.copy_to(THERE, RANK, STEP)
            assert len(callers) == 2

    asyncio.run(scenario())


def test_nobody_is_called_more_than_three_times(tmp_path: Path) -> None:
    async def hang_up(end: End) -> None:
        await end.hear()

    async def scenario() -> None:
        async with answering(hang_up) as (address, callers), calling(tmp_path, address) as node:
            with pytest.raises(UnreachableError, match=f"{address}: EndedError"):
                await node.keeper.copy_to(THERE, RANK, STEP)
            assert len(callers) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "[::1]:1", "localhost:1", "nowhere", ":", "x:y"]
)
def test_an_address_at_which_nobody_is_says_so(tmp_path: Path, address: str) -> None:
    async def scenario() -> None:
        async with calling(tmp_path, address) as node:
            with pytest.raises(UnreachableError, match=r"Refused|ValueError|assign address"):
                await node.keeper.copy_to(THERE, RANK, STEP)

    asyncio.run(scenario())


def test_agents_may_have_addresses_of_ipv6(tmp_path: Path) -> None:
    async def scenario() -> None:
        keeper = Keeper(tmp_path, token=TOKEN, host="::1")
        try:
            address = await keeper.open()
        except OSError as error:
            pytest.skip(f"this machine has no IPv6: {error}")
        assert address.startswith("[::1]:")
        keeper.begin(GENERATION, {}, None)
        async with calling(tmp_path, address) as node:
            await node.keeper.copy_to(THERE, RANK, STEP)
            assert [held.rank for held in keeper.holdings()] == [RANK]
        await keeper.close()

    asyncio.run(scenario())


def test_signals_stay_with_the_agent_and_close_ends_within_seconds(tmp_path: Path) -> None:
    async def scenario() -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        node = Node(tmp_path / "here")
        address = await node.keeper.open()
        ends = [
            await call(address),
            await greet(address),
            await greet(address, offer()),
        ]
        await settled(lambda: node.files() != [])
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before

        begun = time.monotonic()
        await node.keeper.close()
        assert time.monotonic() - begun < 3.0
        assert node.files() == []
        with pytest.raises(ConnectionRefusedError):
            await call(address)
        for end in ends:
            await end.hung_up()
            end.close()

    asyncio.run(scenario())


def test_nobody_who_is_idle_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(peers, "_CLOSE_S", 60)
        node = Node(tmp_path / "here")
        address = await node.keeper.open()
        ends = [await call(address), await greet(address)]
        await settled(lambda: len(node.keeper._server._callers) == 2)

        await asyncio.wait_for(node.keeper.close(), 10)
        for end in ends:
            await end.hung_up()
            end.close()

    asyncio.run(scenario())
