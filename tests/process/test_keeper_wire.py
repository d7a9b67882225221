"""What agents may be sent by peers that break: and what is left of it."""

import asyncio
import errno
import os
import socket
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from orchestrator.agent import peers, transfer
from orchestrator.agent.shards import NoRoomError, UnreachableError
from orchestrator.agent.wire import Wire
from orchestrator.protocol.ids import Step
from storage.shard import encode_index
from tests.shards import RANK, STEP, THERE, Clock, Node, sealed, settled, two
from tests.speaking import (
    BODY,
    DONE,
    HELLO,
    INDEX,
    LINEAGE,
    READY,
    End,
    ask,
    call,
    frame,
    greet,
    offer,
    pick,
)

pytestmark = pytest.mark.process

OTHER_BLOCKS = INDEX.replace(b'"block_bytes":16777216', b'"block_bytes":16777217')
OTHER_STEP = encode_index(sealed(0, 8, 2)[0])
BROKEN: dict[str, tuple[bytes, bytes, str, str]] = {
    # The offer, what follows once there is room, and how it is refused.
    "shorter body": (offer(body_bytes=len(BODY) - 1), INDEX, "Malformed", "offered were step 7"),
    "longer body": (offer(body_bytes=len(BODY) + 1), INDEX, "Malformed", "offered were step 7"),
    "no index": (offer(index_bytes=2), b"{}", "Malformed", "does not decode"),
    "index is not text": (offer(index_bytes=64), b"\xff" * 64, "Malformed", "not text"),
    "other step": (offer(index_bytes=len(OTHER_STEP)), OTHER_STEP, "Malformed", "is of step 8"),
    "contradiction": (offer(), OTHER_BLOCKS + BODY, "Malformed", "contradicts itself"),
    "another's body": (offer(), INDEX + bytes(sealed(1, 7, 2)[1]), "Corrupt", "xxh3-128"),
    "huge index": (offer(index_bytes=1 << 60), b"", "Malformed", "may have 67108864"),
    "empty index": (offer(index_bytes=0), b"", "Malformed", "index_bytes"),
    "empty body": (offer(body_bytes=0), b"", "Malformed", "body_bytes"),
    "huge body": (offer(body_bytes=1 << 62), b"", "NoRoom", "are free"),
    "no lineage": (offer(lineage=None), b"", "Malformed", "without a lineage"),
    "half a lineage": (offer(lineage=LINEAGE | {"retained": "x"}), b"", "Malformed", "retained"),
    "rank is text": (offer(rank="../../x"), b"", "Malformed", "rank"),
    "rank below zero": (offer(rank=-1), b"", "Malformed", "rank"),
    "an unknown field": (offer(more=1), b"", "Malformed", "more"),
    "an answer": (READY, b"", "Malformed", "expected Ask or Pick or Offer"),
    "an error": (frame({"type": "Failed", "kind": "x", "reason": "y"}), b"", "Keeper", "y"),
    "an unknown message": (frame({"type": "Exec"}), b"", "Malformed", "does not decode"),
    "no message": (frame(7), b"", "Malformed", "does not decode"),
    "garbage": (b"\x08\0\0\0" + b"\xc1" * 8, b"", "Malformed", "does not decode"),
    "a long frame": (b"\x01\x10\0\0" + b"x", b"", "Malformed", "4097 bytes, may have 4096"),
    "a longest frame": (b"\xff" * 4, b"", "Malformed", "4294967295 bytes, may have"),
    "a web browser": (b"GET / HTTP/1.1\r\n\r\n", b"", "Malformed", "may have 4096"),
    "a large pick": (pick(size=(4 << 20) + 1), b"", "Malformed", "size"),
    "a pick of nothing": (pick(size=0), b"", "Malformed", "size"),
    "a pick from below": (pick(start=-1), b"", "Malformed", "start"),
    "a pick of what is not held": (pick(), b"", "NotHeld", "rank 0, step 7 is not in"),
    "what is not held": (ask(), b"", "NotHeld", "rank 0, step 7 is not in"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_is_refused_with_its_reason_and_leaves_no_file(
    tmp_path: Path, how: str
) -> None:
    first, then, kind, reason = BROKEN[how]

    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            end = await greet(there.address, first)
            answer = await end.hear()
            if then:
                assert answer == {"type": "Ready"}
                await end.send(then)
                answer = await end.hear()
            if answer["type"] == "Pick":  # what came damaged is asked for once more
                await end.send(frame({"type": "Piece"}), bytes(answer["size"]))
                answer = await end.hear()
            assert answer["kind"] == f"{kind}Error", answer
            assert reason in answer["reason"]
            await end.hung_up()
            assert (there.files(), there.held) == ([], [])
            end.close()

    asyncio.run(scenario())


def test_who_breaks_off_in_the_middle_is_told_where(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            for sent, reason in (
                (offer()[:3], "after 0 of 1 bytes"),
                (offer()[:20], "after 16 of"),
                (offer() + INDEX[:100], f"after 100 of {len(INDEX)} bytes"),
                (offer() + INDEX + BODY[:-1], f"after {len(BODY) - 1} of {len(BODY)}"),
            ):
                end = await greet(there.address, sent)
                end.socket.shutdown(socket.SHUT_WR)
                answer = await end.hear()
                if answer == {"type": "Ready"}:
                    answer = await end.hear()
                assert (answer["kind"], reason in answer["reason"]) == ("MalformedError", True)
                assert there.files() == []
                end.close()

    asyncio.run(scenario())


def test_what_comes_after_a_shard_is_no_part_of_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            end = await greet(there.address, offer(), INDEX, BODY, b"and more")
            answers = [(await end.hear())["type"] for _ in range(3)]
            assert answers == ["Ready", "Done", "Failed"]
            await end.hung_up()
            (file,) = there.memory.iterdir()
            assert file.read_bytes() == BODY
            end.close()

    asyncio.run(scenario())


def test_a_shard_that_does_not_fit_is_refused_before_any_of_it_is_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            end = await greet(there.address, offer(body_bytes=1 << 39))
            assert (await end.hear())["kind"] == "NoRoomError"
            assert there.files() == []
            end.close()

    asyncio.run(scenario())


def test_a_copy_of_an_older_lineage_is_refused_before_any_of_it_is_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            there.begin(3, {}, 5)
            end = await greet(there.address, offer())
            answer = await end.hear()
            assert answer["kind"] == "StaleError"
            assert "copy is of generation 2 from the seed" in answer["reason"]
            end.close()

    asyncio.run(scenario())


def test_a_full_memory_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            monkeypatch.setattr(os, "posix_fallocate", refuse)
            with pytest.raises(NoRoomError, match="No space left"):
                await here.keeper.copy_to(THERE, RANK, STEP)
            assert there.files() == []

    asyncio.run(scenario())


STALLS = {
    # How it connects, and what it says then.
    "says nothing": (call, b""),
    "half a hello": (call, HELLO[:20]),
    "no proof": (call, HELLO),
    "half a proof": (call, HELLO + bytes(20)),
    "half a length": (greet, offer()[:2]),
    "half a frame": (greet, offer()[:20]),
    "no index": (greet, offer()),
    "half an index": (greet, offer() + INDEX[: len(INDEX) // 2]),
    "no body": (greet, offer() + INDEX),
    "half a body": (greet, offer() + INDEX + BODY[: len(BODY) // 2]),
}


@pytest.mark.parametrize("how", STALLS)
@pytest.mark.parametrize("ending", ["stalls", "dies"])
def test_a_sender_that_stalls_or_dies_is_given_up_at_any_point(
    tmp_path: Path, how: str, ending: str
) -> None:
    async def scenario() -> None:
        node = Node(tmp_path / "here", transfer_s=0.2 if ending == "stalls" else 60)
        address = await node.keeper.open()
        connect, said = STALLS[how]
        end = await connect(address, said)
        begun = time.monotonic()
        if offer() in said:
            await settled(lambda: node.files() != [])
        if ending == "dies":
            end.close()
        await settled(lambda: not node.keeper._server._callers and node.files() == [])
        assert time.monotonic() - begun < 10
        if ending == "stalls":
            await end.hung_up()
            end.close()
        await node.keeper.close()

    asyncio.run(scenario())


def test_a_sender_may_take_as_long_as_it_likes_if_it_is_never_silent_for_long(
    tmp_path: Path,
) -> None:
    clock = Clock()
    pieces = [BODY[start : start + 20_000] for start in range(0, len(BODY), 20_000)]

    async def scenario() -> None:
        node = Node(tmp_path / "here", transfer_s=60)
        address = await node.keeper.open()
        clock.start()
        end = await greet(address, offer())
        assert await end.hear() == {"type": "Ready"}
        await end.send(INDEX)
        (name,) = node.files()
        for number, piece in enumerate(pieces, start=1):
            clock.ahead_s += 40
            await end.send(piece)
            come = BODY[: 20_000 * number]
            await settled(
                lambda come=come: (node.memory / name).read_bytes().startswith(come)  # type: ignore[misc]
            )

        assert await end.hear() == {"type": "Done"}
        assert clock.ahead_s > 2 * 60
        end.close()
        await node.keeper.close()

    asyncio.run(scenario())


def test_what_is_sent_at_a_rate_takes_the_time_that_follows_from_it_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, slept, sent = Clock(), 0.0, 0
    send_file, sleep = Wire.send_file, asyncio.sleep

    async def slow_send(self: Wire, *what: Any) -> None:
        nonlocal sent
        sent += 1
        clock.ahead_s += 0.5
        await send_file(self, *what)

    async def sleep_at_once(seconds: float) -> None:
        nonlocal slept
        slept += seconds
        clock.ahead_s += max(seconds, 0)
        await sleep(0)

    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            monkeypatch.setattr(transfer, "PACED_BYTES", len(BODY) // 4 + 1)
            monkeypatch.setattr(Wire, "send_file", slow_send)
            clock.start()
            with monkeypatch.context() as patch:
                patch.setattr(asyncio, "sleep", sleep_at_once)
                await here.keeper.copy_to(THERE, RANK, STEP, bytes_per_s=len(BODY) / 10)

            assert there.held == [(2, RANK, STEP)]
            assert sent == 4
            # Sending took 2 of the 10 s; more, if the machine is slow.
            assert 0 < slept <= 8

    asyncio.run(scenario())


def test_a_caller_that_is_idle_for_too_long_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            monkeypatch.setattr(peers, "IDLE_S", 0.1)
            end = await greet(there.address)
            await end.hung_up()
            end.close()
            # And whoever keeps a connection for that long finds it dead, and makes another.
            here.stage(0, 7, 2)
            await here.keeper.copy_to(THERE, RANK, STEP)
            await settled(lambda: not there.keeper._server._callers)
            await here.keeper.copy_to(THERE, RANK, STEP)

    asyncio.run(scenario())


def test_a_reader_that_stalls_is_given_up_and_what_it_read_is_let_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path / "here", transfer_s=0.2)
        address = await node.keeper.open()
        node.stage(0, 7, 0, size=40_000_000)
        end = await greet(address, ask(), READY)
        assert (await end.hear())["body_bytes"] > 40_000_000

        node.keeper.retain(Step(8))
        assert node.freed == []
        await settled(lambda: node.freed == [(0, 0)])
        end.close()
        await node.keeper.close()

    asyncio.run(scenario())


def test_a_shard_stays_as_it_is_until_its_reader_says_that_it_has_all_of_it(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        node = Node(tmp_path / "here")
        address = await node.keeper.open()
        node.stage(0, 7, 0)
        end = await greet(address, ask(), READY)
        offered = await end.hear()
        size = offered["index_bytes"] + offered["body_bytes"]
        assert len(await end.read(size)) == size
        # All is sent and taken. But a slower reader would still have pages of this very file to
        # come, and a rank may write to it as soon as it is free.
        node.keeper.retain(Step(8))
        await asyncio.sleep(0.1)
        assert node.freed == []

        await end.send(DONE)
        await settled(lambda: node.freed == [(0, 0)])
        end.close()
        await node.keeper.close()

    asyncio.run(scenario())


# Many of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("connect", [call, greet], ids=["strangers", "idle peers"])
def test_a_flood_of_connections_keeps_nobody_out(tmp_path: Path, connect: Any) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            flood = [await connect(there.address) for _ in range(5 * peers.CALLERS_MAX)]
            await settled(lambda: len(there.keeper._server._callers) == peers.CALLERS_MAX)

            await here.keeper.copy_to(THERE, RANK, STEP, timeout_s=2)

            assert there.held == [(2, 0, 7)]
            await settled(lambda: len(there.keeper._server._serving) == peers.CALLERS_MAX)
            for end in flood:
                end.close()

    asyncio.run(scenario())


def test_when_all_connections_are_in_use_a_newcomer_is_refused_and_may_come_again(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            busy: list[End] = []
            for _ in range(peers.CALLERS_MAX):
                busy.append(await greet(there.address, offer()))
                assert await busy[-1].hear() == {"type": "Ready"}

            with pytest.raises(UnreachableError):
                await here.keeper.copy_to(THERE, RANK, STEP, timeout_s=5)

            busy.pop().close()
            await settled(lambda: len(there.keeper._server._callers) < peers.CALLERS_MAX)
            await here.keeper.copy_to(THERE, RANK, STEP, timeout_s=5)
            for end in busy:
                end.close()
            await settled(lambda: len(there.files()) == 1)

    asyncio.run(scenario())
