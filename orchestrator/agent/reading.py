"""Reads shards from the durable tier into memory, in threads of their own.

One that hangs in a dead file system keeps none of the threads that verify, make room and remove.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TypeVar

from orchestrator.agent.durable import DurableCheckpoint, DurableShard, read_shard, require_step
from orchestrator.agent.files import Files, remove
from orchestrator.agent.shards import Shard
from orchestrator.agent.threads import DaemonThreads
from orchestrator.protocol.ids import Rank, Step
from storage.manifest import Manifest

READS_AT_ONCE = 8
T = TypeVar("T")


class Reading:
    """One node's. Every method belongs on the event loop.

    Args:
        files: names those that are made.

    Attributes:
        threads: where the durable tier is read.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self.threads = DaemonThreads(READS_AT_ONCE, "holdfast-read")

    def close(self) -> None:
        """Begin no read any more; one that is under way ends by itself."""
        self.threads.shutdown()

    async def read(self, durable: DurableShard, wanted: tuple[Rank, Step]) -> Shard:
        """Read a committed shard into a new file, verified; see `read_shard` for what it raises."""
        manifest = await self._manifest(durable.checkpoint)
        group = None
        if manifest.grouped:
            digests = durable.checkpoint.group(manifest, durable.shard, self.threads)
            group = await _shared(digests)
        path = self._files.new("restore", *wanted)
        reading = self.threads.submit(read_shard, durable, manifest, group, wanted, path)
        try:
            return await asyncio.wrap_future(reading)
        except asyncio.CancelledError:
            # A thread can not be stopped; what it still brings is removed.
            reading.add_done_callback(lambda _: remove(path))
            raise

    async def require(self, checkpoint: DurableCheckpoint, step: Step) -> None:
        """Check that a checkpoint is there and of a step; see `require_step` for what it raises."""
        require_step(await self._manifest(checkpoint), step)

    async def _manifest(self, checkpoint: DurableCheckpoint) -> Manifest:
        return await _shared(checkpoint.manifest(self.threads))


async def _shared(reading: Future[T]) -> T:
    # Others may wait for the same: who is cancelled does not take it from them.
    return await asyncio.shield(asyncio.wrap_future(reading))
