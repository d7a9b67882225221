"""The agent's end of a rank's socket, with whatever a rank may do to it."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

import pytest

from orchestrator.agent.control import UNSENT_MAX_BYTES, Control
from orchestrator.protocol.ids import Generation
from orchestrator.protocol.rank import (
    Abort,
    FromRank,
    Offer,
    Reached,
    Rendezvous,
    frame,
)

pytestmark = pytest.mark.process


class Rank:
    """The other end, and what the agent made of it."""

    def __init__(self) -> None:
        ours, self.socket = socket.socketpair()
        self.heard: list[FromRank] = []
        self.broken: list[str] = []
        self.control = Control(ours, self.heard.append, self.broken.append)


def play(scene: Callable[[Rank], Awaitable[None]]) -> Rank:
    async def run() -> Rank:
        rank = Rank()
        try:
            await asyncio.wait_for(scene(rank), 10)
        finally:
            rank.control.close()
            rank.socket.close()
        return rank

    return asyncio.run(run())


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - the code under test has no event to wait for
        await asyncio.sleep(0.001)


OFFER = Offer(generation=Generation(1), address="127.0.0.1:1")


def test_messages_that_come_in_pieces_are_put_together() -> None:
    async def scene(rank: Rank) -> None:
        data = frame(OFFER) + frame(Reached(generation=Generation(1), mark="formed"))
        for index in range(len(data)):
            rank.socket.send(data[index : index + 1])
            await asyncio.sleep(0)
        await until(lambda: len(rank.heard) == 2)

    assert play(scene).heard[0] == OFFER


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x02\0\0\0{}", b"\x03\0\0\0\xff\xfe\xfd"])
def test_what_is_no_message_is_reported_once_and_nothing_is_heard_after_it(data: bytes) -> None:
    async def scene(rank: Rank) -> None:
        rank.socket.send(frame(OFFER))
        await until(lambda: rank.heard)
        rank.socket.send(data + frame(OFFER))
        await until(lambda: rank.broken)
        rank.socket.send(frame(OFFER))
        await asyncio.sleep(0.02)

    rank = play(scene)
    assert (len(rank.broken), rank.heard) == (1, [OFFER])


def test_what_a_rank_said_before_it_ended_is_drained() -> None:
    async def scene(rank: Rank) -> None:
        rank.socket.setblocking(False)
        count = 0
        with contextlib.suppress(BlockingIOError):
            while rank.socket.send(frame(OFFER)):
                count += 1
        rank.socket.close()
        rank.control.drain()
        assert len(rank.heard) == count > 1

    assert not play(scene).broken


def test_a_rank_that_reads_late_gets_everything_in_order_and_the_agent_does_not_wait() -> None:
    async def scene(rank: Rank) -> None:
        orders = [
            Rendezvous(generation=Generation(number), address="x" * 10_000) for number in range(100)
        ]
        for order in orders:
            rank.control.send(order)
        expected = b"".join(map(frame, orders))
        got = b""
        rank.socket.setblocking(False)
        while len(got) < len(expected):
            await asyncio.sleep(0)
            try:
                got += rank.socket.recv(1 << 16)
            except BlockingIOError:
                continue
        assert got == expected

    assert not play(scene).broken


def test_a_rank_that_never_reads_is_given_up_before_it_fills_the_memory() -> None:
    async def scene(rank: Rank) -> None:
        order = Rendezvous(generation=Generation(1), address="x" * 1_000_000)
        for _ in range(2 * UNSENT_MAX_BYTES // 1_000_000):
            rank.control.send(order)

    assert len(play(scene).broken) == 1


def test_a_rank_that_is_gone_is_sent_nothing_and_that_is_no_error() -> None:
    async def scene(rank: Rank) -> None:
        rank.socket.close()
        for _ in range(3):
            rank.control.send(Abort(before=Generation(2)))
            await asyncio.sleep(0)
        rank.control.close()
        rank.control.send(Abort(before=Generation(2)))

    assert not play(scene).broken
