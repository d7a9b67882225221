"""Mends shards in this node's memory of which some bytes are bad: in place, chunk by chunk.

What is not what was staged is taken from the first origin that has it: another node's memory, then
the durable tier. It is verified as it comes, which tells whose bytes are bad, and again where it
was written, so memory that does not keep its bits mends nothing. The rest of the shard stays as it
is: of a gigabyte with a flipped bit, one chunk comes over the network.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import xxhash

from orchestrator.agent.calling import PeerClient
from orchestrator.agent.frames import PICK_BYTES_MAX, Pick, Piece
from orchestrator.agent.shards import (
    CorruptError,
    KeeperError,
    NotHeldError,
    Shard,
    UnreachableError,
)
from orchestrator.agent.threads import DaemonThreads
from orchestrator.agent.transfer import look_at_file, write_all
from orchestrator.agent.wire import Wire
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.messages import BadCopy, MendedCopy
from storage.blob import BlobStore, get_small
from storage.errors import StorageError
from storage.filling import HEADER, Damage, file_reader, find_chunk_damage, find_header_damage
from storage.manifest import body_key, index_key
from storage.shard import (
    INDEX_BYTES_MAX,
    ShardIndex,
    StagedChunk,
    as_staged,
    decode_index,
    describe,
    plan,
)

log = logging.getLogger(__name__)
WHAT_MAX = 500
MEND_WITHIN_S = 4.0
"""Less than what a phase of a recovery may stand still; then the shard is looked for elsewhere."""
READ_WITHIN_S = 10.0
"""An origin that does not answer costs no more than this, and no more than half of the mend."""
HERE = NodeId("here")
"""Of a header: it follows from the index."""


class Origin(Protocol):
    """Where bytes of a shard can be had anew."""

    @property
    def node(self) -> NodeId:
        """Whose memory; "" for the durable tier."""
        ...

    async def read(self, shard: Shard, index: ShardIndex, start: int, size: int) -> bytes:
        """Return bytes of its body, of whose soundness nothing is known.

        Raises:
            KeeperError: if another node has not got them, or does not answer.
            StorageError: if the durable tier has not got them, or does not answer.
        """
        ...


@dataclass(frozen=True, slots=True)
class CopyElsewhere:
    """A copy in another node's memory; `client` calls its agent at `address`."""

    node: NodeId
    address: str
    client: PeerClient

    async def read(self, shard: Shard, index: ShardIndex, start: int, size: int) -> bytes:
        """See `Origin.read`."""
        del index  # it sends no other shard than that of this rank and step
        return await self.client.pick(self.address, (shard.rank, shard.step), start, size)


@dataclass(slots=True)
class SentAgain:
    """What its sender still has pinned, at the other end of the connection that it came by."""

    node: NodeId
    wire: Wire
    broken: bool = False
    """Whether bytes may be on the way that nobody takes: then nothing else can be said there."""

    async def read(self, shard: Shard, index: ShardIndex, start: int, size: int) -> bytes:
        """See `Origin.read`."""
        del index  # it has offered no other
        if self.broken:
            raise UnreachableError(f"{self.wire.name} was not done with what it was asked for")
        self.broken = True
        try:
            await self.wire.say(Pick(shard.rank, shard.step, start, size))
            await self.wire.hear(Piece)
            content = await self.wire.read(size)
        except OSError as error:
            raise UnreachableError(f"{self.wire.name}: {error}") from error
        self.broken = False
        return content


@dataclass(slots=True)
class DurableCopy:
    """The same shard on the durable tier, if it was written; it is read in `threads`."""

    store: BlobStore
    threads: DaemonThreads
    node: NodeId = NodeId("")
    _same: str = ""
    """The index that was found to be that of the shard on the durable tier."""

    async def read(self, shard: Shard, index: ShardIndex, start: int, size: int) -> bytes:
        """See `Origin.read`."""

        def read() -> bytes:
            where = (index.step, index.epoch, index.shard)
            # An index that is there promises its body, and one that says the same has no other.
            if self._same != shard.index:
                found = get_small(self.store, index_key(*where), INDEX_BYTES_MAX)
                if as_staged(decode_index(found)) != as_staged(index):
                    raise NotHeldError(f"durable is another than {shard}: {index_key(*where)}")
                self._same = shard.index
            return self.store.get(body_key(*where), start, size)

        return await asyncio.wrap_future(self.threads.submit(read))


@dataclass(slots=True)
class Mending:
    """Of one shard, which the caller has pinned until this is over.

    Args:
        shard: in whose file it is done.
        origins: where to look, the fastest first.
        in_thread: makes a call in a thread, and keeps the shard pinned for as long as that takes.
        within_s: after so many seconds of bringing bytes it is given up.
        sender: who sent it so just now; "" if it lay here.

    Attributes:
        mended: what was brought anew, by where it came from.
        lacking: what nodes had that had other bytes than those that were staged; the first of each.
    """

    shard: Shard
    origins: Sequence[Origin]
    in_thread: Callable[[Callable[[], object]], Awaitable[None]]
    within_s: float
    sender: NodeId = NodeId("")
    mended: dict[NodeId, MendedCopy] = field(default_factory=dict)
    lacking: dict[NodeId, BadCopy] = field(default_factory=dict)
    _index: ShardIndex = field(init=False)
    _damage: list[Damage] = field(default_factory=list)
    _left: list[Origin] = field(default_factory=list)
    """Origins that have not said that they have not got it."""

    async def look_and_mend(self) -> None:
        """Look at every byte, and bring anew what is damaged.

        Raises:
            NotHeldError: if there is no file.
            MalformedError: if its index is not one.
            CorruptError: if some of it is to be had nowhere, or not in time, or memory does not
                keep it.
            OSError: if the file can not be read or written.
        """
        await self.in_thread(self._look)
        if not self._damage:
            return
        found = self._damage[0]
        log.warning("%s: %d chunks went bad, the first: %s", self.shard, len(self._damage), found)
        self._left = list(self.origins)
        try:
            async with asyncio.timeout(self.within_s):
                for part in self._damage:
                    if part.name != HEADER:
                        await self._bring(part)
        except TimeoutError:
            raise CorruptError(
                f"{self.shard.path.name}: {found} of {describe(self._index)}; "
                f"{len(self._damage)} such are not all mended after {self.within_s:g} s"
            ) from None
        await self.in_thread(self._mend_header)

    def _look(self) -> None:
        self._index, self._damage = look_at_file(self.shard.path, self.shard.index)

    async def _bring(self, part: Damage) -> None:
        (chunk,) = [one for one in self._index.chunks if one.name == part.name]
        for origin in self._left:
            try:
                await self._copy(origin, chunk)
            except (KeeperError, StorageError) as error:
                where = origin.node or "the durable tier"
                log.warning(
                    "%s: %s is not to be had from %s: %s", self.shard, part.name, where, error
                )
                if isinstance(error, CorruptError):
                    self._note_lacking(origin.node, error)
                else:  # it will say the same of the next chunk
                    self._left = [one for one in self._left if one is not origin]
            else:
                # What came was good: if this is not, it is the memory here.
                await self.in_thread(lambda: self._require(chunk))
                self._note(origin.node, part)
                return
        raise CorruptError(f"{self.shard.path.name}: {part} of {describe(self._index)}")

    async def _copy(self, origin: Origin, chunk: StagedChunk) -> None:
        """Write over what is damaged, a piece at a time: a chunk may have gigabytes."""
        answer_s = min(READ_WITHIN_S, self.within_s / 2)
        came = xxhash.xxh3_128()
        for start in range(chunk.start, chunk.end, PICK_BYTES_MAX):
            size = min(PICK_BYTES_MAX, chunk.end - start)
            try:
                async with asyncio.timeout(answer_s):
                    content = await origin.read(self.shard, self._index, start, size)
            except TimeoutError:
                raise UnreachableError(f"{size} bytes took more than {answer_s:g} s") from None
            await self.in_thread(partial(self._write, start, content, came))
        found, expected = came.hexdigest(), chunk.xxh3_128
        if found != expected:
            raise CorruptError(f"xxh3-128 is {found}, index says {expected}: {chunk.name}")

    def _write(self, start: int, content: bytes, came: xxhash.xxh3_128) -> None:
        came.update(content)
        # Opened anew each time: who is not waited for any more can not be left without a file.
        with self.shard.path.open("r+b", buffering=0) as file:
            write_all(file.fileno(), start, memoryview(content))

    def _require(self, chunk: StagedChunk) -> None:
        with self.shard.path.open("rb", buffering=0) as file:
            found = find_chunk_damage(chunk, file_reader(file.fileno()))
        if found is not None:
            raise CorruptError(f"{self.shard.path.name}: {found}, although it came whole")

    def _mend_header(self) -> None:
        """Check it; it follows from the index, so it is made anew if need be."""
        with self.shard.path.open("r+b", buffering=0) as file:
            read = file_reader(file.fileno())
            found = find_header_damage(self._index, read)
            if found is None:
                return
            header = plan(self._index.chunks).header
            write_all(file.fileno(), 0, memoryview(header))
            if (again := find_header_damage(self._index, read)) is not None:
                raise CorruptError(f"{self.shard.path.name}: {again} of {describe(self._index)}")
        self._note(HERE, replace(found, end=len(header)))

    def _note_lacking(self, node: NodeId, error: CorruptError) -> None:
        if node:  # the durable tier is scrubbed, and has verdicts of its own
            shard = self.shard
            bad = BadCopy(node, shard.rank, shard.step, str(error)[:WHAT_MAX])
            self.lacking.setdefault(node, bad)

    def _note(self, origin: NodeId, part: Damage) -> None:
        known = self.mended.get(origin)
        self.mended[origin] = MendedCopy(
            rank=self.shard.rank,
            origin=origin,
            chunks=1 + (known.chunks if known else 0),
            size=part.end - part.start + (known.size if known else 0),
            what=known.what if known else str(part)[:WHAT_MAX],
            sender=self.sender,
        )
