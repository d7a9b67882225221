"""What it takes to be let in by an agent, or to pass for one: the run's token, and nothing less."""

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.agent import greeting
from orchestrator.agent.greeting import StrangerError
from orchestrator.agent.shards import KeeperError, UnreachableError
from tests.shards import RANK, STEP, THERE, Node, calling, settled, two
from tests.speaking import (
    HELLO,
    PROTOCOL,
    READY,
    End,
    answering,
    ask,
    call,
    frame,
    greet,
    offer,
    proof,
)

pytestmark = pytest.mark.process


def challenge(nonce: bytes, shown: bytes) -> bytes:
    return frame({"type": "Challenge", "nonce": nonce, "proof": shown})


# Whoever calls ----------------------------------------------------------------------------------

UNHEARD = {
    "zeros": bytes(48),
    "the protocol before": b"holdfast" + bytes(32),
    "the protocol to come": PROTOCOL[:-1] + b"4" + bytes(32),
    "a web browser": b"GET /shards/0/7 HTTP/1.1\r\nAuthorization: Bearer x\r\n\r\n",
}


@pytest.mark.parametrize("how", UNHEARD)
def test_who_speaks_another_protocol_is_told_so_before_anything_else(
    tmp_path: Path, how: str
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            end = await call(there.address, UNHEARD[how])
            answer = await end.hear()
            assert answer["kind"] == "StrangerError"
            assert "'holdfast peers 3'" in answer["reason"]
            assert await end.hear() == {}
            end.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["another token", "no token", "the last bit", "zeros", "reflected"])
@pytest.mark.parametrize(
    "wanted", [ask(), offer(), b"\xff" * 5000], ids=["asks", "offers", "babbles"]
)
def test_a_stranger_gets_nothing_and_leaves_nothing(
    tmp_path: Path, how: str, wanted: bytes
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            for node in (here, there):
                before = node.files()
                end = await call(node.address, HELLO)
                told = await end.hear()
                drawn = bytes(32) + told["nonce"]
                right = proof(b"caller", drawn, node.address)
                shown = {
                    "another token": proof(b"caller", drawn, node.address, "t0ken2"),
                    "no token": proof(b"caller", drawn, node.address, ""),
                    "the last bit": right[:-1] + bytes([right[-1] ^ 1]),
                    "zeros": bytes(32),
                    "reflected": told["proof"],
                }
                await end.send(shown[how], wanted)
                # The same whatever was wanted: nothing after the proof has been read.
                answer = {"type": "Failed", "kind": "StrangerError"}
                assert await end.hear() == answer | {"reason": "token is not this run's"}
                assert await end.hear() == {}
                assert node.files() == before
                end.close()

    asyncio.run(scenario())


def test_what_a_caller_said_once_is_worth_nothing_a_second_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            # The hello is the same and the server's challenge is not.
            end = await call(there.address, HELLO)
            first = await end.hear()
            said = proof(b"caller", bytes(32) + first["nonce"], there.address) + offer()
            await end.send(said)
            assert await end.hear() == {"type": "Ready"}
            end.close()
            await settled(lambda: there.files() == [])

            again = await call(there.address, HELLO, said)
            second = await again.hear()
            assert second["nonce"] != first["nonce"]
            assert (await again.hear())["kind"] == "StrangerError"
            assert there.files() == []
            again.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("said", [b"", HELLO[:20], HELLO, HELLO + bytes(31)])
def test_a_silent_caller_is_hung_up_on_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr("orchestrator.agent.peers.WITHIN_S", 0.2)

    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            begun = time.monotonic()
            end = await call(there.address, said)
            await end.hung_up()
            assert time.monotonic() - begun < 5
            assert not there.keeper._server._callers
            end.close()

    asyncio.run(scenario())


def test_a_caller_that_drips_is_given_no_more_time_than_one_that_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.agent.peers.WITHIN_S", 0.3)

    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            begun = time.monotonic()
            end = await call(there.address)
            while there.keeper._server._callers or time.monotonic() - begun < 0.1:
                await end.send(b"h")
                await asyncio.sleep(0.02)
                assert time.monotonic() - begun < 5
            end.close()

    asyncio.run(scenario())


# Whoever is called ------------------------------------------------------------------------------


def test_agents_with_different_tokens_hear_nothing_of_each_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            here.keeper._client._token = "of another run"  # noqa: S105 - of tests
            with pytest.raises(StrangerError, match="does not know this run's token"):
                await here.keeper.copy_to(THERE, RANK, STEP)
            assert there.files() == []

    asyncio.run(scenario())


async def impostor(end: End, how: str, address: str) -> bytes:
    """Answer a caller without the token; return everything that it says."""
    hello = await end.read(len(HELLO))
    own, theirs = bytes(32), hello[16:]
    await end.send(
        {
            "another token": challenge(own, proof(b"server", theirs + own, address, "t0ken2")),
            "its own hello": challenge(theirs, theirs),
            "zeros": challenge(own, bytes(32)),
            "a short proof": challenge(own, b""),
            "a long proof": challenge(own, bytes(4000)),
            "a huge frame": b"\xff" * 4,
            "no challenge": READY,
        }[how]
    )
    return hello + await end.read(1 << 20)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("another token", "does not know this run's token"),
        ("its own hello", "does not know this run's token"),
        ("zeros", "does not know this run's token"),
        ("a short proof", "does not decode"),
        ("a long proof", "does not decode"),
        ("a huge frame", "may have 4096"),
        ("no challenge", "expected Challenge"),
    ],
)
def test_an_impostor_learns_nothing_and_is_called_once(
    tmp_path: Path, how: str, reason: str
) -> None:
    heard: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    address = "{}:{}".format(*listener.getsockname())

    async def serve() -> None:
        while True:
            end = End((await asyncio.get_running_loop().sock_accept(listener))[0])
            heard.append(await impostor(end, how, address))
            end.close()

    async def scenario() -> None:
        async with calling(tmp_path, address) as node:
            serving = asyncio.create_task(serve())
            with pytest.raises(KeeperError, match=reason):
                await node.keeper.copy_to(THERE, RANK, STEP, timeout_s=5)
            await settled(lambda: bool(heard))
            serving.cancel()
            await asyncio.wait([serving])

    asyncio.run(scenario())
    listener.close()
    (said,) = heard
    assert len(said) == len(HELLO)


def test_two_callers_never_draw_the_same(tmp_path: Path) -> None:
    drawn: list[bytes] = []

    async def listen(end: End) -> None:
        drawn.append(await end.read(len(HELLO)))

    async def scenario() -> None:
        async with answering(listen, greets=False) as (address, _), calling(tmp_path, address) as n:
            with pytest.raises(UnreachableError):
                await n.keeper.copy_to(THERE, RANK, STEP)

    asyncio.run(scenario())
    assert len(set(drawn)) == len(drawn) == 3


def test_who_sits_at_the_address_of_another_can_not_pass_for_an_agent_by_asking_one(
    tmp_path: Path,
) -> None:
    """An agent died, and somebody without the token has its port: it asks an agent that lives."""
    relayed: list[dict[str, Any]] = []

    async def scenario() -> None:
        async with two(tmp_path / "those") as (_, alive):

            async def relay(end: End) -> None:
                beyond = await call(alive.address, await end.read(len(HELLO)))
                told = await beyond.hear()
                relayed.append(told)
                await end.send(challenge(told["nonce"], told["proof"]))
                assert await end.read(1) == b"", "the caller showed its proof"
                beyond.close()

            async with (
                answering(relay, greets=False) as (address, _),
                calling(tmp_path, address) as node,
            ):
                with pytest.raises(StrangerError, match="or has another address"):
                    await node.keeper.copy_to(THERE, RANK, STEP)

    (tmp_path / "those").mkdir()
    asyncio.run(scenario())
    assert len(relayed) == 1


@pytest.mark.parametrize("said", [b"", b"\x50\x00\x00\x00"], ids=["nothing", "half a frame"])
def test_a_silent_peer_is_given_up_in_time_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(greeting, "WITHIN_S", 0.2)

    async def be_silent(end: End) -> None:
        await end.send(said)
        await end.hung_up()

    async def scenario() -> None:
        async with (
            answering(be_silent, greets=False) as (address, callers),
            calling(tmp_path, address) as node,
        ):
            with pytest.raises(UnreachableError, match=r"has not shown the token within 0.2 s"):
                await node.keeper.copy_to(THERE, RANK, STEP, timeout_s=30)
            assert len(callers) == 3

    asyncio.run(scenario())


def test_a_greeting_is_cut_off_with_the_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            answering(End.hung_up, greets=False) as (address, callers),
            calling(tmp_path, address) as node,
        ):
            task = asyncio.create_task(node.keeper.copy_to(THERE, RANK, STEP))
            await settled(lambda: bool(callers))
            begun = time.monotonic()
            node.keeper.unreachable = True
            with pytest.raises(UnreachableError, match="cut off"):
                await task
            assert time.monotonic() - begun < 2

    asyncio.run(scenario())


def test_a_connection_is_greeted_once(tmp_path: Path) -> None:
    async def hold_twice(end: End) -> None:
        for _ in range(2):
            told = await end.hear()
            await end.send(READY)
            await end.read(told["index_bytes"] + told["body_bytes"])
            await end.send(frame({"type": "Done"}))

    async def scenario() -> None:
        async with answering(hold_twice) as (address, callers), calling(tmp_path, address) as node:
            for _ in range(2):
                await node.keeper.copy_to(THERE, RANK, STEP)
            assert len(callers) == 1

    asyncio.run(scenario())


def test_who_knows_the_token_is_let_in(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path / "here")
        address = await node.keeper.open()
        node.stage(0, 7, 0)
        end = await greet(address, ask())
        assert (await end.hear())["type"] == "Offer"
        end.close()
        await node.keeper.close()

    asyncio.run(scenario())
