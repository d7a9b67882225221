"""Brings a shard into a file of the agent's own: from another node, or of another replica's rank.

What of it was damaged on its way is brought once more, chunk by chunk, rather than all of it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import replace

from orchestrator.agent.calling import PeerClient
from orchestrator.agent.checking import Checking
from orchestrator.agent.files import Files, remove
from orchestrator.agent.shards import CorruptError, KeeperError, Shard, Shelf
from orchestrator.agent.transfer import copy_file, verify_file
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step

log = logging.getLogger(__name__)


class Bringing:
    """One node's. Every method belongs on the event loop.

    Args:
        files: names those that are made.
        shelf: pins what is copied.
        client: calls other agents.
        checking: mends what came damaged.
        threads: where files are made, copied and verified.
        address_of: waits for the address of a node.
    """

    def __init__(
        self,
        files: Files,
        shelf: Shelf,
        client: PeerClient,
        *,
        checking: Checking,
        threads: Executor,
        address_of: Callable[[NodeId], Awaitable[str]],
    ) -> None:
        self._files, self._shelf, self._client = files, shelf, client
        self._checking, self._threads, self._address_of = checking, threads, address_of

    async def fetched(
        self,
        source: NodeId,
        wanted: tuple[Rank, Step],
        *,
        mend_s: float = math.inf,
        epoch: Generation | None = None,
    ) -> Shard:
        """Fetch a shard from another node's memory, of whichever generation staged it or of one.

        Raises:
            KeeperError: of the class that says why not, and whose fault that is; there is no file
                then.
        """
        address = await self._address_of(source)
        path = self._files.new("restore", *wanted)
        shard, problem = await self._client.fetch(address, wanted, path, self._threads, epoch)
        if problem is None:
            return shard
        log.warning("%s came damaged from %s: %s", shard, source, problem)
        try:
            await self._checking.mend(shard, mend_s, source)
        except BaseException as error:
            remove(path)
            if isinstance(error, KeeperError | OSError):
                raise problem from error
            raise
        return shard

    async def copied(self, twin: Shard, rank: Rank) -> Shard:
        """Copy what another rank staged here, verified.

        If it came out damaged, what it is a copy of is mended, and copied once more.

        Raises:
            KeeperError: of the class that says why not; there is no file then.
        """
        try:
            return await self._copy_of(twin, rank)
        except CorruptError as error:
            log.warning("%s, a copy for rank %d, came out damaged: %s", twin, rank, error)
            await self._checking.verified(twin)
            return await self._copy_of(twin, rank)

    async def _copy_of(self, twin: Shard, rank: Rank) -> Shard:
        path = self._files.new("restore", rank, twin.step)

        def copy() -> None:
            copy_file(twin.path, path, twin.size)
            try:
                verify_file(path, twin.index)
            except KeeperError:
                path.unlink()
                raise

        self._shelf.pin(twin)
        running = asyncio.get_running_loop().run_in_executor(self._threads, copy)
        running.add_done_callback(lambda _: self._shelf.unpin(twin))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            # A thread can not be stopped: what it made meanwhile goes at once.
            running.add_done_callback(lambda _: self._files.remove_soon(path))
            raise
        # What became of that one meanwhile does not happen to its copy.
        fresh = replace(twin, rank=rank, path=path, slot=None, staged_as=twin.rank)
        fresh.pins, fresh.dropped, fresh.renewed = 0, False, False
        return fresh
