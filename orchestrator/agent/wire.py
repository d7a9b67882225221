"""A connection between two agents: frames, and files that never pass Python.

A file leaves by sendfile(2). It arrives by splice(2): from the socket through a pipe into the file,
up to a megabyte whenever the loop finds the socket ready. Taking 100 MB costs 30 ms of processor
time this way; by recv_into a mapping of the file 80, since each of its pages faults; by recv_into a
buffer and pwrite 45. A thread with a blocking socket is no cheaper than the loop, on which a
transfer can be cancelled between two pieces, and a peer that stalls holds no thread.

sendfile(2) hands on the pages themselves: until the other end says that it has them all, a file
that is sent must stay as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from orchestrator.agent.frames import LENGTH, M, Message, frame, heard, length_of
from orchestrator.agent.shards import CorruptError

PIECE_BYTES = 1 << 20
_READ_BYTES = 1 << 18
"""Room made at a time for what is read into memory, however much was announced."""


class EndedError(ConnectionError):
    """The other end hung up where more had to come."""


async def connect(address: str) -> Wire:
    """Call "host:port".

    Raises:
        OSError: if nobody answers there.
        ValueError: if it is no address.
    """
    host, _, port = address.rpartition(":")
    places = await _resolve(host.strip("[]"), int(port))
    for place in places[:-1]:
        with contextlib.suppress(OSError):
            return await _connect(place, address)
    return await _connect(places[-1], address)


class Wire:
    """One connection, for one task at a time; only `abort` is for others.

    Whatever waits raises OSError (EndedError is one) if the connection is lost, and may be
    cancelled; the connection can only be closed then.

    Attributes:
        name: the other end, for people.
        on_moved: called when some bytes of a file or of anything else that is read came or went.
    """

    def __init__(self, connected: socket.socket, name: str) -> None:
        self.name = name
        self.on_moved: Callable[[], None] = lambda: None
        self._socket = connected
        self._begun = b""
        self._in_file = False
        connected.setblocking(False)
        # Nagle's algorithm would hold short messages back for 40 ms.
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def abort(self) -> None:
        """Have whatever waits, at both ends, wait no longer."""
        with contextlib.suppress(OSError):  # not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def is_quiet(self) -> bool:
        """Whether the connection stands and nothing has been said that nobody read."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    async def is_called(self) -> bool:
        """Wait for the first bytes of a frame; return False if the other end hung up instead."""
        self._begun = await asyncio.get_running_loop().sock_recv(self._socket, LENGTH.size)
        return bool(self._begun)

    async def hear(self, *kinds: type[M]) -> M:
        """Return the next message.

        Raises:
            MalformedError: if it is too long, does not decode, or is of another kind.
            KeeperError: if it is `Failed`: of the class that was told.
        """
        head = self._begun + await self.read(LENGTH.size - len(self._begun))
        self._begun = b""
        return heard(await self.read(length_of(head)), self.name, kinds)

    async def say(self, message: Message) -> None:
        """Send a message."""
        await self.write(frame(message))

    def say_last(self, message: Message) -> None:
        """Send a message if that takes no waiting; it is no loss if it does not arrive."""
        if not self._in_file:  # it would be taken for a part of the file
            with contextlib.suppress(OSError):
                self._socket.send(frame(message))

    async def read(self, size: int) -> bytes:
        """Return the next `size` bytes; takes no more memory than was really sent."""
        loop = asyncio.get_running_loop()
        found = bytearray()
        while (missing := size - len(found)) > 0:
            piece = await loop.sock_recv(self._socket, min(missing, _READ_BYTES))
            if not piece:
                raise EndedError(f"{self.name} hung up after {len(found)} of {size} bytes")
            found += piece
            self.on_moved()
        return bytes(found)

    async def write(self, content: bytes) -> None:
        """Send bytes."""
        await asyncio.get_running_loop().sock_sendall(self._socket, content)

    async def send_file(self, descriptor: int, size: int, start: int = 0) -> None:
        """Send `size` bytes of a file, from `start` on.

        Raises:
            CorruptError: if it has fewer.
        """

        def move(at: int) -> int:
            piece = min(PIECE_BYTES, size - at)
            sent = os.sendfile(self._socket.fileno(), descriptor, start + at, piece)
            if not sent:
                raise CorruptError(f"file ends after {start + at} of {start + size} bytes")
            return sent

        loop = asyncio.get_running_loop()
        self._in_file = True
        await self._move_all(loop.add_writer, loop.remove_writer, move, size)
        self._in_file = False

    async def receive_file(self, descriptor: int, size: int) -> None:
        """Write the next `size` bytes to the beginning of a file, which has room for them."""
        with _pipe() as (outlet, inlet):

            def move(at: int) -> int:
                came = os.splice(self._socket.fileno(), inlet, min(PIECE_BYTES, size - at))
                if not came:
                    raise EndedError(f"{self.name} hung up after {at} of {size} bytes of a file")
                written = 0
                while written < came:
                    written += os.splice(
                        outlet, descriptor, came - written, offset_dst=at + written
                    )
                return came

            loop = asyncio.get_running_loop()
            await self._move_all(loop.add_reader, loop.remove_reader, move, size)

    async def _move_all(
        self,
        watch: Callable[[socket.socket, Callable[[], None]], None],
        unwatch: Callable[[socket.socket], object],
        move: Callable[[int], int],
        size: int,
    ) -> None:
        """Call `move(at)`, which returns how many bytes it moved, as often as the socket is ready.

        Watched from the first piece to the last: to begin and end that for each costs as much as
        the piece.
        """
        moved: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        at = 0

        def proceed() -> None:
            nonlocal at
            if moved.done():  # failed or cancelled in this round of the loop
                return
            try:
                at += move(at)
            except BlockingIOError:
                return
            except Exception as error:  # noqa: BLE001 - raised by who waits
                moved.set_exception(error)
                return
            self.on_moved()
            if at == size:
                moved.set_result(None)

        watch(self._socket, proceed)
        try:
            await moved
        finally:
            unwatch(self._socket)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """Make a pipe with room for a piece, if the user has any left; with less it takes longer."""
    outlet, inlet = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, PIECE_BYTES)
        yield outlet, inlet
    finally:
        os.close(outlet)
        os.close(inlet)


_Place = tuple[Any, ...]
"""What getaddrinfo returns for one: family, kind, protocol, name, address."""


async def _resolve(host: str, port: int) -> list[_Place]:
    look_up = partial(socket.getaddrinfo, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    try:
        return list(look_up(host, port, flags=socket.AI_NUMERICHOST))
    except socket.gaierror:
        # A name: somebody is asked for it, which may take as long as it likes.
        return list(await asyncio.get_running_loop().run_in_executor(None, look_up, host, port))


async def _connect(place: _Place, name: str) -> Wire:
    family, kind, protocol, _, where = place
    calling = socket.socket(family, kind, protocol)
    try:
        wire = Wire(calling, name)
        await asyncio.get_running_loop().sock_connect(calling, where)
    except BaseException:
        calling.close()
        raise
    return wire
