"""Ends of a connection between agents that say what a test has them say, right or wrong."""

import asyncio
import contextlib
import hmac
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from storage.shard import encode_index
from tests.shards import TOKEN, sealed

PROTOCOL = b"holdfast peers 3"
HELLO = PROTOCOL + bytes(32)
"""What a caller says first; it need not draw well."""
INDEX, BODY = (encode_index(sealed(0, 7, 2)[0]), bytes(sealed(0, 7, 2)[1]))
LINEAGE = {"generation": 2, "restore": None, "retained": -1}


def proof(role: bytes, drawn: bytes, address: str, token: str = TOKEN) -> bytes:
    """Return what shows that one end knows the token; `drawn` by the caller, then by the server."""
    return hmac.digest(token.encode(), PROTOCOL + role + drawn + address.encode(), "sha256")


def frame(message: object) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


def ask(rank: int = 0, step: int = 7) -> bytes:
    return frame({"type": "Ask", "rank": rank, "step": step})


def pick(start: int = 0, size: int = 8) -> bytes:
    return frame({"type": "Pick", "rank": 0, "step": 7, "start": start, "size": size})


def offer(**changes: Any) -> bytes:
    """Return the offer of a copy of the shard that INDEX and BODY are of."""
    whole = {
        "type": "Offer",
        "rank": 0,
        "step": 7,
        "index_bytes": len(INDEX),
        "body_bytes": len(BODY),
        "lineage": LINEAGE,
    }
    return frame(whole | changes)


READY, DONE = frame({"type": "Ready"}), frame({"type": "Done"})


class End:
    """One end of a connection, as bytes."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected

    async def send(self, *pieces: bytes) -> None:
        """Send something; whether the other end has hung up is seen when it is heard."""
        with contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(self.socket, b"".join(pieces))

    async def read(self, size: int) -> bytes:
        """Return so many bytes; fewer if the other end has hung up."""
        found = b""
        with contextlib.suppress(ConnectionError):
            while len(found) < size:
                reading = asyncio.get_running_loop().sock_recv(self.socket, size - len(found))
                piece = await asyncio.wait_for(reading, 5)
                if not piece:
                    break
                found += piece
        return found

    async def hear(self) -> dict[str, Any]:
        """Return the next message; {} if the other end has hung up instead."""
        body = await self.read(int.from_bytes(await self.read(4), "little"))
        return dict(msgspec.msgpack.decode(body)) if body else {}

    async def hung_up(self) -> None:
        """Wait until the other end is gone, whatever it still says."""
        while await self.read(1 << 20):
            pass

    def close(self) -> None:
        """Hang up; what was not read resets the connection."""
        self.socket.close()


async def greet(address: str, *pieces: bytes, token: str = TOKEN) -> End:
    """Connect to an agent as one that knows the token does, and send something."""
    end = await call(address, HELLO)
    challenge = await end.hear()
    drawn = bytes(32) + challenge["nonce"]
    if token == TOKEN:
        assert challenge["proof"] == proof(b"server", drawn, address)
    await end.send(proof(b"caller", drawn, address, token), *pieces)
    return end


async def call(address: str, *pieces: bytes) -> End:
    """Connect to an agent and send something."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    end = End(socket.socket())
    try:
        await loop.sock_connect(end.socket, (host, int(port)))
    except OSError:
        end.close()
        raise
    await end.send(*pieces)
    return end


async def admit(end: End, address: str) -> None:
    """Have a caller show that it knows the token."""
    hello = await end.read(len(HELLO))
    assert hello[:16] == PROTOCOL
    drawn = hello[16:] + bytes(32)
    await end.send(
        frame({"type": "Challenge", "nonce": drawn[32:], "proof": proof(b"server", drawn, address)})
    )
    assert await end.read(32) == proof(b"caller", drawn, address)


@contextlib.asynccontextmanager
async def answering(
    *answers: Callable[[End], Awaitable[object]],
    greets: bool = True,
) -> AsyncIterator[tuple[str, list[End]]]:
    """Play a peer that treats its first caller as told first, and so on, the last one for ever.

    Unless told otherwise, it has its callers greet it first.

    Yields its address, and the callers so far. Whoever was answered is hung up on.
    """
    callers: list[End] = []
    tasks: list[asyncio.Task[None]] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    loop = asyncio.get_running_loop()

    async def serve(end: End, answer: Callable[[End], Awaitable[object]]) -> None:
        try:
            if greets:
                await admit(end, "{}:{}".format(*listener.getsockname()))
            await answer(end)
        finally:
            end.close()

    async def accept() -> None:
        while True:
            callers.append(End((await loop.sock_accept(listener))[0]))
            answer = answers[min(len(callers), len(answers)) - 1]
            tasks.append(asyncio.create_task(serve(callers[-1], answer)))

    tasks.append(asyncio.create_task(accept()))
    host, port = listener.getsockname()
    try:
        yield f"{host}:{port}", callers
    finally:
        for task in tasks:
            task.cancel()
        listener.close()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
