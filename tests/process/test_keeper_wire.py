"""What agents may be sent by strangers and by peers that break: and what is left of it."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import httpx
import msgspec
import pytest

from orchestrator.agent.shards import ERRORS, KeeperError, NoRoomError, UnreachableError
from orchestrator.protocol.ids import Rank, Step
from storage.shard import encode_index
from tests.shards import GENERATION, RANK, STEP, THERE, TOKEN, Node, sealed, settled, two

pytestmark = pytest.mark.process


LINEAGE = {"Holdfast-Generation": "2", "Holdfast-Restore": "", "Holdfast-Retained": "-1"}


INDEX, BODY = (encode_index(sealed(0, 7, 2)[0]), bytes(sealed(0, 7, 2)[1]))


def stream(index: bytes, body: bytes) -> bytes:
    return len(index).to_bytes(8, "little") + index + body


def put(address: str, content: bytes, **headers: str) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=5) as client:
        shown = {"Authorization": f"Bearer {TOKEN}"} | LINEAGE | headers
        return client.put(f"http://{address}/shards/0/7", content=content, headers=shown)


async def begin_put(
    address: str, announced: int, sent: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Announce a copy of so many bytes, and send only some of them."""
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = {"Authorization": f"Bearer {TOKEN}", "Host": host} | LINEAGE
    lines["Content-Length"] = str(announced)
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"PUT /shards/0/7 HTTP/1.1\r\n{text}\r\n".encode() + sent)
    return reader, writer


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer nonsense", "Bearer t0ken2"])
def test_a_stranger_gets_nothing_and_leaves_nothing(tmp_path: Path, authorization: str) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            response = await asyncio.to_thread(
                put, there.address, stream(INDEX, BODY), Authorization=authorization
            )
            assert response.status_code == 401
            assert there.files() == []
            async with httpx.AsyncClient(trust_env=False) as client:
                response = await client.get(
                    f"http://{here.address}/shards/0/7", headers={"Authorization": authorization}
                )
            assert (response.status_code, len(response.content)) == (401, 23)

    asyncio.run(scenario())


OTHER_BLOCKS = INDEX.replace(b'"block_bytes":16777216', b'"block_bytes":16777217')
BROKEN = {
    "short body": (stream(INDEX, BODY[:-1]), 400, "has shard"),
    "long body": (stream(INDEX, BODY + b"x"), 400, "has shard"),
    "no index": (stream(b"", BODY), 400, "does not decode"),
    "index is not text": (stream(b"\xff" * 64, BODY), 400, "not text"),
    "index ends early": (stream(INDEX, BODY)[:200], 400, "index has"),
    "nothing": (b"", 400, "ends within the index: 0 of 8"),
    "index of 2**60 bytes": (b"\0" * 7 + b"\x10" + BODY, 400, "may have"),
    "other step": (stream(encode_index(sealed(0, 8, 2)[0]), BODY), 400, "step 7"),
    "index contradicts itself": (stream(OTHER_BLOCKS, BODY), 400, "contradicts itself"),
    "another's body": (stream(INDEX, bytes(sealed(1, 7, 2)[1])), 422, "xxh3-128"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_stream_is_refused_with_its_reason_and_leaves_no_file(
    tmp_path: Path, how: str
) -> None:
    content, status, reason = BROKEN[how]

    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            response = await asyncio.to_thread(put, there.address, content)
            assert (response.status_code, reason in response.text) == (status, True), response.text
            assert (there.files(), there.held) == ([], [])

    asyncio.run(scenario())


@pytest.mark.parametrize("header", ["Holdfast-Generation", "Holdfast-Retained"])
def test_a_copy_without_a_lineage_is_refused(tmp_path: Path, header: str) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            response = await asyncio.to_thread(put, there.address, b"", **{header: "x"})
            assert (response.status_code, header in response.text) == (400, True)

    asyncio.run(scenario())


def test_a_shard_that_does_not_fit_is_refused_before_any_of_it_is_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            size = 1 << 39
            index = huge(size)
            head = stream(index, b"")
            reader, writer = await begin_put(there.address, len(head) + size + 4096, head)
            answer = await asyncio.wait_for(reader.readline(), 5)
            writer.close()

            assert b" 507 " in answer
            assert there.files() == []

    asyncio.run(scenario())


def huge(size: int) -> bytes:
    """Return the index of a shard that no memory has room for; its digests are made up."""
    index, _ = sealed(0, 7, 2)
    chunk = msgspec.structs.replace(
        index.chunks[0],
        dtype="U8",
        shape=(size,),
        global_shape=(size,),
        start=4096,
        end=4096 + size,
    )
    crcs = (0,) * -(-(4096 + size) // index.block_bytes)
    return encode_index(
        msgspec.structs.replace(index, chunks=(chunk,), size=4096 + size, crc32c=crcs)
    )


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


# Peers in other processes, which stop answering -----------------------------------------------

PEER = """
import asyncio, sys
from pathlib import Path
from orchestrator.agent.keeper import Keeper
from tests.shards import stage

async def main():
    keeper = Keeper(Path(sys.argv[1]), token=sys.argv[2])
    print(await keeper.open(), flush=True)
    keeper.begin(2, {}, None)
    keeper.staged(1, stage(Path(sys.argv[1]), 1, 7, 2, size=40_000_000))
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A keeper in a process of its own: the process, and its address."""
    memory = tmp_path / "peer"
    memory.mkdir()
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", PEER, str(memory), TOKEN],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert process.stdout.readline() == "ready\n"
        yield process, address
        process.kill()


def test_a_frozen_peer_costs_no_more_than_the_time_that_was_given(
    tmp_path: Path, peer: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = peer

    async def scenario() -> None:
        node = Node(tmp_path / "here")
        await node.keeper.open()
        node.keeper.begin(GENERATION, {THERE: address}, None)
        node.stage(0, 7, 2, size=40_000_000)
        process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(UnreachableError, match=r"after 0.3 s"):
            await node.keeper.copy_to(THERE, RANK, STEP, timeout_s=0.3)
        with pytest.raises(UnreachableError, match=r"not here from node-1 in 0.3 s"):
            await node.keeper.prepare(Rank(1), STEP, THERE, timeout_s=0.3)
        assert time.monotonic() - begun < 2.0
        assert node.files() == ["rank-00000.slot-0"]

        process.send_signal(signal.SIGCONT)
        await node.keeper.copy_to(THERE, RANK, STEP)
        assert (await node.keeper.prepare(Rank(1), STEP, THERE))[1] == "fetched"
        await node.keeper.close()

    asyncio.run(scenario())


def test_a_peer_that_is_killed_while_it_sends_leaves_nothing_half_here(
    tmp_path: Path, peer: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = peer

    async def scenario() -> None:
        node = Node(tmp_path / "here")
        await node.keeper.open()
        node.keeper.begin(GENERATION, {THERE: address}, None)
        preparing = asyncio.create_task(node.keeper.prepare(Rank(1), STEP, THERE, timeout_s=5))
        await settled(lambda: node.files() != [], pause_s=0)
        process.kill()

        with pytest.raises(UnreachableError):
            await preparing
        assert node.files() == []
        assert node.keeper.holdings() == ()
        await node.keeper.close()

    asyncio.run(scenario())


def test_a_sender_that_is_killed_leaves_nothing_half_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (_, there):
            content = stream(INDEX, BODY)
            _, writer = await begin_put(there.address, len(content), content[: len(content) // 2])
            await settled(lambda: there.files() != [])
            writer.transport.abort()

            await settled(lambda: there.files() == [])
            assert there.held == []

    asyncio.run(scenario())


def test_a_sender_that_stalls_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path / "here", transfer_s=0.2)
        content = stream(INDEX, BODY)
        address = await node.keeper.open()
        _, writer = await begin_put(address, len(content), content[: len(content) // 2])
        await settled(lambda: node.files() != [])

        await settled(lambda: node.files() == [])
        writer.close()
        await node.keeper.close()

    asyncio.run(scenario())


def test_a_reader_that_stalls_is_given_up_and_what_it_read_is_let_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path / "here", transfer_s=0.2)
        host, _, port = (await node.keeper.open()).partition(":")
        node.stage(0, 7, 0, size=40_000_000)
        reader, writer = await asyncio.open_connection(host, int(port))
        lines = f"Host: {host}\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        writer.write(f"GET /shards/0/7 HTTP/1.1\r\n{lines}".encode())
        assert b"200" in await reader.readline()

        node.keeper.retain(Step(8))
        assert node.freed == []
        await settled(lambda: node.freed == [(0, 0)])
        writer.transport.abort()
        await node.keeper.close()

    asyncio.run(scenario())


def test_signals_stay_with_the_agent_and_close_ends_within_seconds(tmp_path: Path) -> None:
    async def scenario() -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        node = Node(tmp_path / "here")
        address = await node.keeper.open()
        host, _, port = address.partition(":")
        _, idle = await asyncio.open_connection(host, int(port))
        await asyncio.sleep(0.05)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before

        begun = time.monotonic()
        await node.keeper.close()
        assert time.monotonic() - begun < 3.0
        with pytest.raises(OSError, match="Connect"):
            await asyncio.open_connection(host, int(port))
        idle.close()

    asyncio.run(scenario())


def test_errors_are_told_apart_by_class_on_both_sides() -> None:
    assert len({kind.status for kind in ERRORS}) == len(KeeperError.__subclasses__())
