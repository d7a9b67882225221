"""A shard as a stream of bytes, and back into a file of shared memory, verified.

The stream is 8 bytes of little-endian length, the index that long, and the body. The index comes
first so that the receiver knows how much memory it takes before it takes any.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from orchestrator.agent.shards import (
    CorruptError,
    MalformedError,
    NoRoomError,
    NotHeldError,
    Shard,
)
from orchestrator.protocol.ids import Rank, Step
from storage.errors import StorageError
from storage.shard import ShardIndex, decode_index, verify

INDEX_BYTES_MAX = 64 << 20
PIECE_BYTES = 1 << 20
_LENGTH = struct.Struct("<Q")


def stream_size(shard: Shard) -> int:
    """Return how many bytes `pieces_of` yields in all."""
    return _LENGTH.size + len(shard.index.encode()) + shard.size


async def pieces_of(shard: Shard) -> AsyncIterator[bytes]:
    """Yield a shard as a stream; the caller has pinned it.

    Raises:
        CorruptError: if the file is shorter than its index says.
    """
    index = shard.index.encode()
    yield _LENGTH.pack(len(index)) + index
    with shard.path.open("rb", buffering=0) as file:
        for start in range(0, shard.size, PIECE_BYTES):
            piece = os.pread(file.fileno(), min(PIECE_BYTES, shard.size - start), start)
            if not piece:
                raise CorruptError(f"{shard} ends after {start} of {shard.size} bytes")
            yield piece


async def receive(
    pieces: AsyncIterator[bytes],
    announced: int,
    path: Path,
    wanted: tuple[Rank, Step],
    threads: Executor,
) -> Shard:
    """Write the shard that a stream carries to a new file and verify it there.

    Args:
        pieces: the stream, cut anyhow.
        announced: its length, as its sender announced it; trusted no further than that.
        path: of the new file. If this raises, there is no such file.
        wanted: rank and step that the shard must be of.
        threads: where to verify.

    Raises:
        MalformedError: if the stream is not what was announced, or not the shard wanted.
        NoRoomError: if there is too little shared memory for it.
        CorruptError: if the body is not what was staged.
    """
    in_thread = partial(asyncio.get_running_loop().run_in_executor, threads)
    text, rest = await _read_index(pieces, announced)
    shard = Shard.of(wanted[0], text, path)
    if shard.step != wanted[1] or announced != stream_size(shard):
        raise MalformedError(
            f"stream of {announced} bytes has {shard} of {shard.size} bytes, "
            f"expected step {wanted[1]}"
        )
    making = in_thread(_make_room, shard)
    try:
        index, descriptor = await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(lambda made: _give_up_room(made, path))
        raise
    try:
        try:
            await _write(descriptor, rest, pieces, shard.size)
        finally:
            os.close(descriptor)
        await in_thread(verify_file, path, index)
    except BaseException:
        _remove(path)
        raise
    return shard


def allocate(path: Path, size: int) -> int:
    """Make a file whose memory is really there; return its descriptor. Blocks.

    Without that, a full memory file system is not an error but the signal SIGBUS, later.

    Raises:
        NoRoomError: if there is too little; there is no file then.
    """
    status = os.statvfs(path.parent)
    free = status.f_bavail * status.f_frsize
    if size > free:
        raise NoRoomError(f"{path.name} needs {size} bytes of shared memory, {free} are free")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise NoRoomError(f"{path.name} needs {size} bytes: {error.strerror}") from error
    return descriptor


def map_file(path: Path, size: int) -> memoryview:
    """Return the first `size` bytes of a file, read-only.

    Raises:
        NotHeldError: if there is no such file.
        CorruptError: if it is shorter.
    """
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ))
    except FileNotFoundError:
        raise NotHeldError(f"there is no file {path.name}") from None
    except ValueError as error:
        raise CorruptError(f"{path.name} has less than {size} bytes: {error}") from error


def verify_file(path: Path, index: ShardIndex | str) -> None:
    """Check that a file has what an index (or its JSON) vouches for. Blocks; 4 GB/s.

    Raises:
        CorruptError: naming the first bad chunk.
        NotHeldError: if there is no such file.
    """
    known = index if isinstance(index, ShardIndex) else _decode(index.encode())
    try:
        verify(known, map_file(path, known.size))
    except StorageError as error:
        raise CorruptError(f"{path.name}: {error}") from error


def _make_room(shard: Shard) -> tuple[ShardIndex, int]:
    # In one go: on a busy loop, each trip to a thread waits 5 ms for the interpreter's lock.
    index = _decode(shard.index.encode())
    return index, allocate(shard.path, shard.size)


def _give_up_room(made: asyncio.Future[tuple[ShardIndex, int]], path: Path) -> None:
    if not made.cancelled() and made.exception() is None:
        os.close(made.result()[1])
        _remove(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _decode(text: bytes) -> ShardIndex:
    try:
        return decode_index(text)
    except StorageError as error:
        raise MalformedError(str(error)) from error


async def _read_index(pieces: AsyncIterator[bytes], announced: int) -> tuple[str, bytes]:
    """Return the index's JSON, and what came of the body with it."""
    head = bytearray()
    needed = _LENGTH.size
    async for piece in pieces:
        head += piece
        if len(head) >= _LENGTH.size:
            length = _LENGTH.unpack_from(head)[0]
            if length > min(INDEX_BYTES_MAX, announced):
                raise MalformedError(f"index has {length} bytes, may have {INDEX_BYTES_MAX}")
            needed = _LENGTH.size + length
            if len(head) >= needed:
                try:
                    text = head[_LENGTH.size : needed].decode()
                except UnicodeDecodeError as error:
                    raise MalformedError(f"index is not text: {error}") from error
                return text, bytes(head[needed:])
    raise MalformedError(f"stream ends within the index: {len(head)} of {needed} bytes")


async def _write(descriptor: int, first: bytes, pieces: AsyncIterator[bytes], size: int) -> None:
    at = _write_at(descriptor, first, 0, size)
    async for piece in pieces:
        at = _write_at(descriptor, piece, at, size)
    if at != size:
        raise MalformedError(f"stream ends after {at} of {size} bytes of the body")


def _write_at(descriptor: int, piece: bytes, at: int, size: int) -> int:
    if at + len(piece) > size:
        raise MalformedError(f"body is longer than the {size} bytes of its index")
    view = memoryview(piece)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written
    return at
