"""Reads a body, piece by piece, to where its bytes are wanted, and verifies what arrived there.

A piece is digested while the cache of the core that read it still has it: that costs half of what
a pass of its own over the same memory does. Chunks are read by several threads. The CRCs of blocks
without a header in them say nothing that the digests of chunks do not say, so those of the header's
blocks alone are computed here.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import xxhash

from storage import parallel
from storage.digest import PASS_BYTES, Buffer, byte_view, crc32c
from storage.errors import ShardCorruptError
from storage.shard import ShardIndex, StagedChunk, describe

Read: TypeAlias = Callable[[int, memoryview], int]
"""Fills a buffer with a body's bytes from a place on; returns how many: fewer past the end."""

HEADER = "header"


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes [start, end) of a body that are not those that were staged.

    Attributes:
        name: of the chunk; `HEADER` for the blocks that the header lies in.
        words: what was found and what was expected.
    """

    name: str
    start: int
    end: int
    words: str

    def __str__(self) -> str:
        return f"{self.words}: {self.name}"


def memory_reader(body: Buffer) -> Read:
    """Return what reads a body that lies in memory."""
    view = byte_view(body)

    def read(start: int, buffer: memoryview) -> int:
        piece = view[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    return read


def file_reader(descriptor: int) -> Read:
    """Return what reads a body from an open file, which has to stay open."""
    return lambda start, buffer: os.preadv(descriptor, [buffer], start)


def read_chunk(index: ShardIndex, chunk: StagedChunk, read: Read, target: memoryview) -> None:
    """Fill memory with a chunk's bytes, and verify what is there then.

    Args:
        index: of the body.
        chunk: of the index.
        read: from the body.
        target: flat, writable, and of the chunk's size.

    Raises:
        ShardCorruptError: if they are not those that were staged; the memory's content is worthless
            then.
        ValueError: if the memory is of another size.
    """
    if len(target) != chunk.end - chunk.start:
        raise ValueError(f"{len(target)} bytes for a chunk of {chunk.end - chunk.start}")
    found = _look(chunk, read, lambda start, end: target[start:end])
    if found is not None:
        raise ShardCorruptError(f"{found} of {describe(index)}")


def require_header(index: ShardIndex, read: Read) -> None:
    """Check the blocks that the header lies in.

    Raises:
        ShardCorruptError: if they are not what was staged.
    """
    found = find_header_damage(index, read)
    if found is not None:
        raise ShardCorruptError(f"{found} of {describe(index)}")


def find_damage(index: ShardIndex, read: Read) -> list[Damage]:
    """Return what of a body is not what was staged, by where it lies; nothing, if all of it is."""
    found = parallel.each(
        lambda chunk: find_chunk_damage(chunk, read), index.chunks, at_once=parallel.CORES
    )
    damaged = [one for one in found if one is not None]
    header = find_header_damage(index, read)
    inside = header is not None and any(one.start < header.end for one in damaged)
    # A block of the header's has chunks in it, whose damage is told by their own digests.
    return damaged if header is None or inside else [header, *damaged]


def find_chunk_damage(chunk: StagedChunk, read: Read) -> Damage | None:
    """Return what is wrong with one chunk."""
    scratch = memoryview(bytearray(min(chunk.end - chunk.start, PASS_BYTES)))
    return _look(chunk, read, lambda start, end: scratch[: end - start])


def find_header_damage(index: ShardIndex, read: Read) -> Damage | None:
    """Return what is wrong with the blocks that the header lies in, whatever lies there with it."""
    header = index.chunks[0].start if index.chunks else index.size
    blocks = -(-header // index.block_bytes)
    scratch = memoryview(bytearray(min(index.size, PASS_BYTES)))
    for number in range(blocks):
        begin = number * index.block_bytes
        stop = min(begin + index.block_bytes, index.size)
        crc = 0
        for start, end in _pieces(begin, stop):
            found = _read_all(read, start, scratch[: end - start])
            crc = crc32c(scratch[:found], crc)
        if crc != index.crc32c[number]:
            words = (
                f"crc32c of the header's block is {crc:08x}, index says {index.crc32c[number]:08x}"
            )
            return Damage(HEADER, begin, stop, words)
    return None


def _look(chunk: StagedChunk, read: Read, room: Callable[[int, int], memoryview]) -> Damage | None:
    """Read a chunk to the memory that `room` has for each piece of it, and digest it there."""
    hasher = xxhash.xxh3_128()
    for start, end in _pieces(0, chunk.end - chunk.start):
        piece = room(start, end)
        found = _read_all(read, chunk.start + start, piece)
        hasher.update(piece[:found])
        if found < len(piece):
            words = f"body ends at byte {chunk.start + start + found}, chunk at {chunk.end}"
            return Damage(chunk.name, chunk.start, chunk.end, words)
    digest = hasher.hexdigest()
    if digest == chunk.xxh3_128:
        return None
    words = f"xxh3-128 is {digest}, index says {chunk.xxh3_128}"
    return Damage(chunk.name, chunk.start, chunk.end, words)


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, PASS_BYTES):
        yield at, min(at + PASS_BYTES, end)


def _read_all(read: Read, start: int, buffer: memoryview) -> int:
    """Read until a buffer is full or the body over: a read may give less than it was asked for."""
    done = 0
    while done < len(buffer) and (count := read(start + done, buffer[done:])):
        done += count
    return done
