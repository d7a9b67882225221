"""Writes shards from memory to the durable tier, of each rank one at a time.

A shard that is being written can not be written over. So a tier that takes long holds one slot of
each rank, and leaves the others to the copies in memory; a rank's next shard waits without a hold
on its slot.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from orchestrator.agent.impressions import Written, of_shard
from orchestrator.agent.shards import NotHeldError, Shard, Shelf
from orchestrator.agent.threads import DaemonThreads
from orchestrator.agent.transfer import map_file
from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.messages import Receipt
from storage.blob import BlobStore
from storage.commit import write_shard
from storage.errors import StorageUnavailableError
from storage.shard import decode_index

WRITES_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class _Write:
    """One that has been begun, or has its place among those that a thread will get to."""

    shard: Shard
    receipt: asyncio.Future[Written]


class Writing:
    """One node's. Every method belongs on the event loop.

    Args:
        shelf: what is written is pinned there.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._threads = DaemonThreads(WRITES_AT_ONCE, "holdfast-write")
        self._unfinished: dict[Rank, _Write] = {}

    def close(self) -> None:
        """Begin no write any more; one that is under way ends by itself."""
        self._threads.shutdown()

    async def turn(self, rank: Rank, *, timeout_s: float) -> None:
        """Wait until nothing of a rank is being written, not even for who has given it up.

        Raises:
            StorageUnavailableError: after `timeout_s`.
        """
        give_up_at = time.monotonic() + timeout_s
        while (write := self._unfinished.get(rank)) is not None:
            left_s = give_up_at - time.monotonic()
            if left_s <= 0:
                raise StorageUnavailableError(f"the durable tier still has {write.shard} to take")
            await asyncio.wait([write.receipt], timeout=left_s)

    async def write(
        self,
        store: BlobStore,
        rank: Rank,
        step: Step,
        generation: Generation,
        *,
        timeout_s: float,
    ) -> Written:
        """Make a shard durable, when it is the turn of its rank; see `Keeper.write`."""
        shard = self._require(rank, step, generation)
        begun = self._unfinished.get(rank)
        # What was given up and not ended is waited for again, not begun a second time.
        if begun is None or begun.shard is not shard:
            await self.turn(rank, timeout_s=timeout_s)
            begun = self._begin(store, self._require(rank, step, generation))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(begun.receipt)
        except TimeoutError:
            raise StorageUnavailableError(
                f"{begun.shard} is not written after {timeout_s:g} s"
            ) from None

    def _require(self, rank: Rank, step: Step, generation: Generation) -> Shard:
        shard = self._shelf.require(rank, step)
        if shard.generation != generation:
            raise NotHeldError(
                f"{shard} is of generation {shard.generation}, expected {generation}"
            )
        return shard

    def _begin(self, store: BlobStore, shard: Shard) -> _Write:
        running = asyncio.get_running_loop().run_in_executor(
            self._threads, _write_shard, store, shard
        )
        self._shelf.pin(shard)
        write = self._unfinished[shard.rank] = _Write(shard, running)
        running.add_done_callback(lambda _: self._end(shard))
        return write

    def _end(self, shard: Shard) -> None:
        del self._unfinished[shard.rank]
        self._shelf.unpin(shard)


def _write_shard(store: BlobStore, shard: Shard) -> Written:
    index = decode_index(shard.index.encode(), staged=True)
    body = map_file(shard.path, shard.size)
    receipt = write_shard(store, index, body)
    written = Receipt(receipt.shard, receipt.size, receipt.index_digest)
    return Written(written, of_shard(index, body))
