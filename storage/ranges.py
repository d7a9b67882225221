"""Reads ranges of many bodies in one go, checks every block that it reads, and keeps a few at hand.

A body has a CRC-32C for every 16 MiB, so a range can be verified without the rest of the body: no
more than two blocks are read in part for nothing. Blocks come in order, each once, whatever number
of ranges lie in it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.blob import BlobStore
from storage.digest import crc32c
from storage.errors import ShardCorruptError
from storage.manifest import body_key
from storage.parallel import ahead
from storage.shard import ShardIndex, describe

BLOCKS_AHEAD = 8


class Landing(Protocol):
    """Takes the bytes of a range, piece by piece and in order."""

    def take(self, at: int, piece: memoryview) -> None:
        """Take the bytes that lie `at` from the range's start; they are verified."""
        ...

    def done(self) -> None:
        """All of them were taken."""
        ...


@dataclass(frozen=True, slots=True)
class Want:
    """Bytes [start, end) of a shard's body, and who takes them; never none."""

    index: ShardIndex
    start: int
    end: int
    landing: Landing


@dataclass(frozen=True, slots=True)
class _Block:
    index: ShardIndex
    number: int
    wants: list[Want]


def read_ranges(
    store: BlobStore, wants: Sequence[Want], read: Callable[[int], object] = lambda _: None
) -> None:
    """Hand every wanted range to its landing.

    Args:
        store: of the run.
        wants: in any order, of any number of shards.
        read: told the bytes of each block that was read and verified.

    Raises:
        BlobNotFoundError: if a body is not there.
        ShardCorruptError: naming the body and block that is not what was staged; what landed
            before is sound.
    """

    def fetch(block: _Block) -> bytes:
        index = block.index
        key = body_key(index.step, index.epoch, index.shard)
        start = block.number * index.block_bytes
        size = min(index.block_bytes, index.size - start)
        data = store.get(key, start, size)
        found = crc32c(data)
        if len(data) != size or found != index.crc32c[block.number]:
            raise ShardCorruptError(
                f"crc32c of bytes {start} to {start + size} is {found:08x} over {len(data)} bytes, "
                f"index says {index.crc32c[block.number]:08x} over {size}: {key} of "
                f"{describe(index)}"
            )
        return data

    blocks = list(_blocks(wants))
    if not blocks:
        return
    for block, data in zip(blocks, ahead(fetch, blocks, BLOCKS_AHEAD), strict=True):
        _land(block, memoryview(data))
        read(len(data))


def _blocks(wants: Sequence[Want]) -> Iterator[_Block]:
    """Yield the blocks that are wanted, by shard and then by number."""
    by_shard: dict[int, list[Want]] = {}
    for want in wants:
        by_shard.setdefault(want.index.shard, []).append(want)
    for shard in sorted(by_shard):
        blocks: dict[int, list[Want]] = {}
        size = by_shard[shard][0].index.block_bytes
        for want in sorted(by_shard[shard], key=lambda one: one.start):
            for number in range(want.start // size, (want.end - 1) // size + 1):
                blocks.setdefault(number, []).append(want)
        for number in sorted(blocks):
            yield _Block(by_shard[shard][0].index, number, blocks[number])


def _land(block: _Block, data: memoryview) -> None:
    begin = block.number * block.index.block_bytes
    for want in block.wants:
        start, end = max(want.start, begin), min(want.end, begin + len(data))
        want.landing.take(start - want.start, data[start - begin : end - begin])
        if end == want.end:
            want.landing.done()
