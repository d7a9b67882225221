"""Has shards in this node's memory looked at before they are used, and mended if need be."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial

from orchestrator.agent.calling import PeerClient
from orchestrator.agent.looks import Looks
from orchestrator.agent.mending import (
    MEND_WITHIN_S,
    CopyElsewhere,
    DurableCopy,
    Mending,
    Origin,
)
from orchestrator.agent.shards import CorruptError, KeeperError, Shard, Shelf
from orchestrator.agent.threads import DaemonThreads
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.messages import BadCopy, MendedCopy
from storage.blob import BlobStore

NO_NODE = NodeId("")


class Checking:
    """One node's. Every method belongs on the event loop.

    Attributes:
        on_mended: called with what of a shard here was brought anew.
        on_lacking: each is called with a copy that another node was to have, and had not with the
            bytes that were staged.
        store: the durable tier of the run; None if there is none.
        mend_s: what is bad in a shard, and not mended after so many seconds, is given up.
        peers: addresses of the other nodes.
    """

    def __init__(
        self,
        shelf: Shelf,
        client: PeerClient,
        *,
        threads: Executor,
        read_threads: DaemonThreads,
        give_up: Callable[[Shard], None],
    ) -> None:
        """Check nothing yet.

        Args:
            shelf: pins what is being looked at.
            client: calls other agents.
            threads: where files are looked at.
            read_threads: where the durable tier is read.
            give_up: drops a shard of which some is bad, and to be had nowhere.
        """
        self.on_mended: Callable[[MendedCopy], None] = lambda _: None
        self.on_lacking: list[Callable[[BadCopy], None]] = []
        self.store: BlobStore | None = None
        self.mend_s = MEND_WITHIN_S
        self.peers: Mapping[NodeId, str] = {}
        self._shelf, self._client = shelf, client
        self._threads, self._read_threads = threads, read_threads
        self._give_up = give_up
        self._looks = Looks()

    async def verified(self, shard: Shard, mend_s: float = math.inf) -> Shard:
        """Return a shard whose bytes are what was staged, perhaps since they were mended just now.

        One that is not, and can not be mended in time, is given up.

        Raises:
            CorruptError: if it is given up.
            KeeperError: of another class, if it is not there, or is not a shard.
        """
        await self._looks.join(shard, partial(self._look_and_mend, shard, mend_s))
        return shard

    async def _look_and_mend(self, shard: Shard, mend_s: float) -> None:
        try:
            await self.mend(shard, mend_s)
        except (KeeperError, OSError) as error:
            self._give_up(shard)
            if isinstance(error, KeeperError):
                raise
            raise CorruptError(f"{shard.path.name} can not be read: {error}") from error

    async def mend(
        self,
        shard: Shard,
        mend_s: float = math.inf,
        sender: NodeId = NO_NODE,
        first: Sequence[Origin] = (),
    ) -> None:
        """Look at a shard that nobody else looks at, and bring anew what of it is bad.

        Args:
            shard: whose file it is.
            mend_s: seconds that it may take.
            sender: who sent it so; "" if it lay here.
            first: where to look before anywhere else.

        Raises:
            KeeperError: if it is not what was staged, and can not be made so; of the class that
                says why.
            OSError: if its file can not be read or written.
        """
        in_thread = partial(self._pinned_in_thread, shard)
        within_s = min(mend_s, self.mend_s)
        asked = {origin.node for origin in first}
        others = [origin for origin in self._origins() if origin.node not in asked]
        mending = Mending(shard, [*first, *others], in_thread, within_s, sender)
        try:
            with self._shelf.pinned(shard):
                await mending.look_and_mend()
        finally:
            # Also of a mend that came to nothing in the end: memory that loses bits is news.
            for bad in mending.lacking.values():
                for hear in self.on_lacking:
                    hear(bad)
            for copy in mending.mended.values():
                self.on_mended(copy)

    def _origins(self) -> list[Origin]:
        """Return where chunks of a shard that is here can be had anew, the fastest first."""
        origins: list[Origin] = [
            CopyElsewhere(node, address, self._client) for node, address in self.peers.items()
        ]
        if self.store is not None:
            origins.append(DurableCopy(self.store, self._read_threads))
        return origins

    async def _pinned_in_thread(self, shard: Shard, work: Callable[[], object]) -> None:
        """Run in a thread; the shard is pinned, and this goes on, until the thread is done."""
        self._shelf.pin(shard)
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        running.add_done_callback(lambda _: self._shelf.unpin(shard))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise
