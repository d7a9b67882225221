"""Gets what another rank reads from the durable tier, so that no shard is read once per replica.

That rank's node begins at about the same time, and has the shard when it has read and verified it.
Until then it is asked again and again, up to a limit; a shard that can not be had from it is read
by this node, too: it costs the store more, and the run nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from orchestrator.agent.bringing import Bringing
from orchestrator.agent.durable import DurableShard
from orchestrator.agent.reading import Reading
from orchestrator.agent.shards import (
    KeeperError,
    NoRoomError,
    NotHeldError,
    Shard,
    Shelf,
    StaleError,
)
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from storage.manifest import parse_commit_key

log = logging.getLogger(__name__)
ASK_AGAIN_S, ASK_AGAIN_MAX_S, SLOWER = 0.05, 1.0, 1.5
"""A shard that is not there yet is asked for again after this, each time so much later, at most."""


class Sharing:
    """One node's. Every method belongs on the event loop.

    Args:
        shelf: has what is read here.
        bringing: copies that, and fetches from other nodes.
        reading: reads here what does not come.
        known: says whether a node can be called: of others, once they have said where they are;
            of this one, never.
    """

    def __init__(
        self, shelf: Shelf, bringing: Bringing, reading: Reading, *, known: Callable[[NodeId], bool]
    ) -> None:
        self._shelf, self._bringing, self._reading, self._known = shelf, bringing, reading, known

    async def bring(
        self,
        durable: DurableShard,
        wanted: tuple[Rank, Step],
        reader: tuple[NodeId, Rank],
        *,
        timeout_s: float,
    ) -> tuple[Shard, Literal["fetched", "durable"]]:
        """Bring a shard that `reader` has or reads: from there, else from the durable tier.

        Args:
            durable: where it lies there.
            wanted: whose it is to be, and of which step.
            reader: the rank that reads it and its node, which may be this one.
            timeout_s: so long at most it is waited for; reading it here takes what it takes.

        Raises:
            NoRoomError: if there is too little shared memory for it.
            StaleError: if the other node knows of a newer generation.
            StorageError: if it was to be read here, and could not.
        """
        rank, step = wanted
        node, staged_by = reader
        named = parse_commit_key(durable.checkpoint.commit)
        if named is not None:
            try:
                async with asyncio.timeout(timeout_s):
                    brought = await self._awaited(
                        node, (staged_by, step), Generation(named[1]), rank
                    )
            except (NoRoomError, StaleError):
                raise
            except (KeeperError, TimeoutError) as error:
                why = str(error) or f"not there after {timeout_s:g} s"
                log.warning("rank %d reads step %d, as %s does: %s", rank, step, node, why)
            else:
                return replace(brought, rank=rank, staged_as=staged_by), "fetched"
        return await self._reading.read(durable, wanted), "durable"

    async def _awaited(
        self, node: NodeId, wanted: tuple[Rank, Step], epoch: Generation, rank: Rank
    ) -> Shard:
        """Return a copy of a shard, once it is here or on that node; nobody else's state of it.

        Raises:
            KeeperError: of the class that says why it will not be.
        """
        pause_s = ASK_AGAIN_S
        while True:
            # Of another epoch it is a state that this generation does not continue from, on a node
            # that has not heard of it yet.
            with contextlib.suppress(NotHeldError):
                twin = self._shelf.require(*wanted, epoch)
                return await self._bringing.copied(twin, rank)
            if self._known(node):
                with contextlib.suppress(NotHeldError):
                    return await self._bringing.fetched(node, wanted, epoch=epoch)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * SLOWER, ASK_AGAIN_MAX_S)
