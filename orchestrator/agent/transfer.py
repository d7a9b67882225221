"""A shard on its way from one node's shared memory into a file of another's, verified there.

Its length is said before it is sent, so that the taker can refuse what it has no room for before
any of it is on its way. frames.py has the order of what is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path

from orchestrator.agent.frames import UNNAMED, Done, Offer, Pick, Piece, Ready
from orchestrator.agent.shards import (
    CorruptError,
    Lineage,
    MalformedError,
    NoRoomError,
    NotHeldError,
    Shard,
)
from orchestrator.agent.wire import Wire
from orchestrator.protocol.ids import NodeId
from storage.errors import StorageError
from storage.filling import Damage, file_reader, find_damage
from storage.shard import ShardIndex, decode_index, describe

INDEX_BYTES_MAX = 64 << 20
PACED_BYTES = 4 << 20
"""What is sent at a rate goes out in pieces of this; after each, its time is waited for."""


async def give(
    wire: Wire,
    shard: Shard,
    lineage: Lineage | None = None,
    bytes_per_s: float | None = None,
    on_ready: Callable[[], None] = lambda: None,
    sender: NodeId = UNNAMED,
) -> None:
    """Offer a shard, which the caller has pinned, and send it; return once the taker is done.

    It is sent as fast as it goes, or at a rate; `on_ready` is called when the taker wants it. What
    of it the taker wants once more is sent once more.

    Raises:
        CorruptError: if the file is shorter than its index says, or the taker has it damaged.
        MalformedError: if the taker wants bytes of something else.
        NotHeldError: if there is no file.
        KeeperError: of the class that the taker said, if it does not want it.
        OSError: if the connection is lost.
    """
    index = shard.index.encode()
    with _opened(shard) as descriptor:
        offer = Offer(
            rank=shard.rank,
            step=shard.step,
            index_bytes=len(index),
            body_bytes=shard.size,
            lineage=lineage,
            sender=sender,
        )
        await wire.say(offer)
        await wire.hear(Ready)
        on_ready()
        try:
            await wire.write(index)
            await _send(wire, descriptor, shard.size, bytes_per_s)
        except ConnectionError:
            # A taker that refuses in the middle says why before it hangs up.
            await wire.hear(Done)
            raise
        # The file stays pinned until here: what was sent are its pages, not copies of them.
        while isinstance(said := await wire.hear(Done, Pick), Pick):
            await _send_again(wire, descriptor, shard, said, bytes_per_s)


async def _send_again(
    wire: Wire, descriptor: int, shard: Shard, wanted: Pick, bytes_per_s: float | None
) -> None:
    known = (wanted.rank, wanted.step) == (shard.rank, shard.step)
    if not known or wanted.start + wanted.size > shard.size:
        raise MalformedError(f"{wire.name} said {wanted}, offered was {shard}, {shard.size} bytes")
    await wire.say(Piece())
    await wire.send_file(descriptor, wanted.size, wanted.start)
    if bytes_per_s is not None:
        await asyncio.sleep(wanted.size / bytes_per_s)


async def _send(wire: Wire, descriptor: int, size: int, bytes_per_s: float | None) -> None:
    if bytes_per_s is None:
        await wire.send_file(descriptor, size)
        return
    clock = asyncio.get_running_loop().time
    begun = clock()
    for start in range(0, size, PACED_BYTES):
        piece = min(PACED_BYTES, size - start)
        await wire.send_file(descriptor, piece, start)
        await asyncio.sleep(begun + (start + piece) / bytes_per_s - clock())


async def take(
    wire: Wire, offer: Offer, path: Path, threads: Executor
) -> tuple[Shard, CorruptError | None]:
    """Receive what was offered into a new file, look at it there; the taker is not `Done` yet.

    Args:
        wire: the connection.
        offer: what its sender announced; trusted no further than for room in memory.
        path: of the new file. If this raises, there is no such file.
        threads: where to make room, and to verify.

    Returns:
        The shard, and what is wrong with its body, if that is not what was staged.

    Raises:
        MalformedError: if what comes is not what was offered.
        NoRoomError: if there is too little shared memory for it.
        OSError: if the connection is lost.
    """
    if offer.index_bytes > INDEX_BYTES_MAX:
        raise MalformedError(f"index has {offer.index_bytes} bytes, may have {INDEX_BYTES_MAX}")
    descriptor = await _room(path, offer.body_bytes, threads)
    try:
        try:
            await wire.say(Ready())
            shard = _shard(await wire.read(offer.index_bytes), offer, path)
            await wire.receive_file(descriptor, shard.size)
        finally:
            os.close(descriptor)
        # One trip to a thread for all the rest: on a busy loop each waits 5 ms for its turn.
        looking = asyncio.get_running_loop().run_in_executor(threads, _problem, path, shard.index)
        return shard, await looking
    except BaseException:
        _remove(path)
        raise


def _problem(path: Path, index: str) -> CorruptError | None:
    try:
        verify_file(path, index)
    except CorruptError as error:
        return error
    return None


def allocate(path: Path, size: int) -> int:
    """Make a file whose memory is really there; return its descriptor. Blocks.

    Raises:
        NoRoomError: if there is too little; there is no file then.
    """
    descriptor = create(path, size)
    try:
        reserve(descriptor, 0, size)
    except NoRoomError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def create(path: Path, size: int) -> int:
    """Make a file of a size, without its memory as yet, if there is room; return its descriptor.

    What of it is written through a map has to be reserved before; see `write_all` for the rest.

    Raises:
        NoRoomError: if there is too little; there is no file then.
    """
    status = os.statvfs(path.parent)
    free = status.f_bavail * status.f_frsize
    if size > free:
        raise NoRoomError(f"{path.name} needs {size} bytes of shared memory, {free} are free")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.ftruncate(descriptor, size)
    return descriptor


def reserve(descriptor: int, start: int, size: int) -> None:
    """Have the memory of a part of a file really there.

    Without that, a full memory file system is not an error but the signal SIGBUS, later.

    Raises:
        NoRoomError: if there is too little.
    """
    try:
        os.posix_fallocate(descriptor, start, size)
    except OSError as error:
        raise NoRoomError(f"{size} bytes of shared memory: {error.strerror}") from error


def write_all(descriptor: int, start: int, content: memoryview) -> None:
    """Write to a place in a file, whose memory is taken as it is written. Blocks.

    Raises:
        NoRoomError: if there is too little.
    """
    try:
        done = 0
        while done < len(content):  # one call takes no more than two gigabytes
            done += os.pwrite(descriptor, content[done:], start + done)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise NoRoomError(f"{len(content)} bytes of shared memory: {error.strerror}") from error


def copy_file(source: Path, path: Path, size: int) -> None:
    """Copy the first `size` bytes of a file into a new one. Blocks.

    Raises:
        NoRoomError: if there is too little memory; there is no new file then.
        NotHeldError: if there is no source.
        CorruptError: if it is shorter.
    """
    content = map_file(source, size)
    descriptor = allocate(path, size)
    try:
        write_all(descriptor, 0, content)
    finally:
        os.close(descriptor)


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


def read_piece(path: Path, start: int, size: int) -> bytes:
    """Return bytes of a file. Blocks.

    Raises:
        NotHeldError: if there is no such file.
        CorruptError: if it ends before them.
    """
    try:
        with path.open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, start)
    except FileNotFoundError:
        raise NotHeldError(f"there is no file {path.name}") from None
    if len(content) < size:
        raise CorruptError(f"{path.name} has {len(content)} of {size} bytes from {start} on")
    return content


def verify_file(path: Path, index: ShardIndex | str) -> None:
    """Check that a file has what an index (or its JSON) vouches for. Blocks; 8 GB/s on each core.

    Raises:
        CorruptError: naming the first bad chunk.
        NotHeldError: if there is no such file.
    """
    known, damage = look_at_file(path, index)
    if damage:
        raise CorruptError(f"{path.name}: {damage[0]} of {describe(known)}")


def look_at_file(path: Path, index: ShardIndex | str) -> tuple[ShardIndex, list[Damage]]:
    """Return the index of a file, and what of the file is not what it vouches for. Blocks.

    Raises:
        NotHeldError: if there is no such file.
    """
    known = index if isinstance(index, ShardIndex) else _decode(index.encode())
    try:
        with path.open("rb", buffering=0) as file:
            return known, find_damage(known, file_reader(file.fileno()))
    except FileNotFoundError:
        raise NotHeldError(f"there is no file {path.name}") from None


@contextlib.contextmanager
def _opened(shard: Shard) -> Iterator[int]:
    try:
        descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotHeldError(f"{shard}: there is no file {shard.path.name}") from None
    try:
        found = os.fstat(descriptor).st_size
        if found < shard.size:
            raise CorruptError(f"{shard} ends after {found} of {shard.size} bytes")
        yield descriptor
    finally:
        os.close(descriptor)


def _shard(index: bytes, offer: Offer, path: Path) -> Shard:
    try:
        text = index.decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"index is not text: {error}") from error
    shard = Shard.of(offer.rank, text, path)
    if (shard.step, shard.size) != (offer.step, offer.body_bytes):
        raise MalformedError(
            f"index is of step {shard.step} and {shard.size} bytes, "
            f"offered were step {offer.step} and {offer.body_bytes} bytes"
        )
    return shard


async def _room(path: Path, size: int, threads: Executor) -> int:
    making = asyncio.get_running_loop().run_in_executor(threads, allocate, path, size)
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(lambda made: _give_up_room(made, path))
        raise


def _give_up_room(made: asyncio.Future[int], path: Path) -> None:
    # A thread can not be stopped: what it made meanwhile goes at once.
    if not made.cancelled() and made.exception() is None:
        os.close(made.result())
        _remove(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _decode(text: bytes) -> ShardIndex:
    try:
        return decode_index(text, staged=True)
    except StorageError as error:
        raise MalformedError(str(error)) from error
