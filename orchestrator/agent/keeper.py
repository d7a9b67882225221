"""Keeps shards in this node's shared memory: its own ranks', and copies for other nodes.

A rank that died resumes from its slot, in place; a node that was lost resumes from the copies that
its buddy keeps. Nothing that crosses a process is used before its digests were checked.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from orchestrator.agent.bringing import Bringing
from orchestrator.agent.calling import PeerClient
from orchestrator.agent.checking import Checking
from orchestrator.agent.durable import DurableCheckpoint, DurableShard
from orchestrator.agent.files import Files
from orchestrator.agent.frames import UNNAMED
from orchestrator.agent.impressions import Written
from orchestrator.agent.peers import PeerServer
from orchestrator.agent.reading import Reading
from orchestrator.agent.shards import (
    SLOTS,
    KeeperError,
    MalformedError,
    NotHeldError,
    Shard,
    Shelf,
    StaleError,
    UnreachableError,
)
from orchestrator.agent.sharing import Sharing
from orchestrator.agent.writing import Writing
from orchestrator.protocol import rank as protocol
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import Ancestor, Holding
from storage.blob import BlobStore
from storage.errors import StorageUnavailableError

Tier = Literal["own", "fetched", "durable"]
"""Where a shard was found: in this node's memory, in another's, on the durable tier."""

WAIT_SHARE = 0.5
"""For so much of the time in which it has to be here, a shard that another node reads from the
durable tier is waited for; the rest is for reading it here after all."""
log = logging.getLogger(__name__)


class Keeper:
    """The shards in a node's memory. Every method belongs on the event loop.

    Attributes:
        on_held: called when `holdings` is to be told: a shard was staged, a copy verified, a step
            given up; with the generation under which the controller is to be told.
        on_freed: called when a staging slot may be written again: tell its rank, if it has a seat.
        checking: looks at shards before they are used, and says what it found.
        unreachable: True refuses peers, calls none, and breaks off what is under way.
        drag: times as long as sending a copy takes, by a fault plan.
    """

    def __init__(
        self, memory: Path, *, token: str, host: str = "127.0.0.1", transfer_s: float = 120.0
    ) -> None:
        """Keep shards in `memory`, an existing folder on a memory file system.

        Args:
            memory: where the slots of ranks are; the keeper's own files lie beside them.
            token: other agents must know it.
            host: address on which other agents reach this one.
            transfer_s: another agent that has sent or taken nothing of a shard for so many
                seconds is given up.
        """
        self.on_held: Callable[[Generation], None] = lambda _: None
        self.on_freed: Callable[[Rank, int], None] = lambda _, __: None
        self._host, self._address_here = host, ""
        self.drag = 1.0
        cores = os.cpu_count() or 1
        self._threads = ThreadPoolExecutor(max(cores, 2), "holdfast-verify")
        self._files = Files(memory, self._threads)
        self._shelf = Shelf(memory, on_freed=self._freed, remove=self._files.remove_soon)
        self._reading, self._writing = Reading(self._files), Writing(self._shelf)
        self._peers: dict[NodeId, str] = {}
        self._peers_changed = asyncio.Event()
        self._client = PeerClient(token)
        self.checking = Checking(
            self._shelf,
            self._client,
            threads=self._threads,
            read_threads=self._reading.threads,
            give_up=self._give_up,
        )
        self._bringing = Bringing(
            self._files,
            self._shelf,
            self._client,
            checking=self.checking,
            threads=self._threads,
            address_of=self._address,
        )
        self._sharing = Sharing(
            self._shelf, self._bringing, self._reading, known=lambda node: node in self._peers
        )
        self._server = PeerServer(
            self._shelf,
            token=token,
            new_file=partial(self._files.new, "copy"),
            threads=self._threads,
            on_copy=lambda generation, _: self.on_held(generation),
            checking=self.checking,
            transfer_s=transfer_s,
        )

    async def open(self) -> str:
        """Serve other agents; return the address for them, "host:port".

        Raises:
            OSError: if `host` is not an address of this machine.
        """
        self._files.remove_all()
        self._address_here = self._server.open(self._host)
        return self._address_here

    async def close(self) -> None:
        """Stop serving and remove every shard, within seconds; a thread may be ending still."""
        self._client.close()
        await self._server.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._reading.close()
        self._writing.close()
        self._files.remove_all()

    @property
    def unreachable(self) -> bool:
        """Whether this node is cut off from its peers."""
        return self._server.unreachable

    @unreachable.setter
    def unreachable(self, value: bool) -> None:
        for side in (self._server, self._client):
            side.unreachable = value
            if value:
                side.break_off()

    # What is held -------------------------------------------------------------------------

    def begin(
        self,
        generation: Generation,
        peers: dict[NodeId, str],
        restore: Step | None,
        ancestors: tuple[Ancestor, ...] | None = None,
    ) -> None:
        """Enter a generation that continues from step `restore`, or from the seed.

        Shards of later steps, or of generations that are not among its `ancestors`, are dropped
        (all, if `restore` is None), unless this generation staged them. Call it before any seat of
        the generation is given, and again when `peers` change. Slots that become free are not
        announced, `free_slots` names them.
        """
        self._peers = dict(peers)
        here = self._address_here
        self.checking.peers = {n: where for n, where in peers.items() if where != here}
        self._peers_changed.set()
        self._peers_changed = asyncio.Event()
        self._shelf.begin(generation, restore, ancestors)

    def pass_by(
        self, generation: Generation, restore: Step | None, ancestors: tuple[Ancestor, ...]
    ) -> None:
        """Drop what a generation abandons in which this node has no seat; see `begin`."""
        self._shelf.begin(generation, restore, ancestors)

    def holds(self, rank: Rank, step: Step, staged_as: Rank) -> bool:
        """Whether the shard that a rank starts from is held here; see `prepare`."""
        return self._held(rank, step, staged_as) is not None

    def seat(self, ranks: Iterable[Rank]) -> None:
        """Free the staging slots of all ranks but these, each as soon as nothing in it is needed.

        To be called when no process of an older generation can write to a slot any more.
        """
        self._shelf.seat(ranks)
        try:
            files = self._files.slots()
        except OSError as error:
            # A node without descriptors, say: no reason not to enter the generation.
            log.warning("slots without a rank stay until the next generation: %s", error)
            return
        for path in self._shelf.spare(files):
            self._files.remove_soon(path)

    def free_slots(self, rank: Rank) -> tuple[int, ...]:
        """Return the slots that a rank may write to, ascending; at most `SLOTS`."""
        return self._shelf.free_slots(rank)

    def staged(self, rank: Rank, message: protocol.Staged) -> None:
        """Hold what a rank has staged, and say so. Its bytes are checked when they are used.

        A message of an older generation is ignored: its slot may have been given away since.

        Raises:
            MalformedError: if the index is not one, or not of what the message says.
        """
        generation = self._shelf.lineage.generation
        if message.generation < generation:
            return
        shard = Shard.of(
            rank, message.index, self._shelf.slot_file(rank, message.slot), message.slot
        )
        found = (shard.step, shard.generation)
        if found != (message.step, message.generation) or not 0 <= message.slot < SLOTS:
            raise MalformedError(
                f"rank {rank}: slot is {message.slot} of {SLOTS}, index is of (step, generation) "
                f"{found}, message of {(message.step, message.generation)}"
            )
        try:
            self._shelf.put(shard)
        except StaleError:
            self.on_freed(rank, message.slot)
            return
        self.on_held(message.generation)

    def make_room(self, rank: Rank) -> bool:
        """Give up a step that has not become safe, for newer ones; return whether one was.

        Ranks that skip saves by themselves can come to hold different steps, none of which is
        whole anywhere; then nothing becomes safe, and nothing is freed, unless somebody gives way.
        """
        given_up = self._shelf.evict(rank)
        if given_up:
            self.on_held(self._shelf.lineage.generation)
        return given_up

    def holdings(self) -> tuple[Holding, ...]:
        """Return everything that is held, by rank and step."""
        return self._shelf.holdings()

    def renewed(self) -> tuple[Holding, ...]:
        """Return those holdings that came, verified, in place of another copy of the same."""
        return self._shelf.renewed()

    def retain(self, step: Step) -> None:
        """Let go of everything older than `step`; slots that become free are told to `on_freed`.

        What is being written, copied or restored from goes when that is over.
        """
        self._shelf.retain(step)

    # Where it goes ------------------------------------------------------------------------

    async def copy_to(
        self,
        buddy: NodeId,
        rank: Rank,
        step: Step,
        *,
        timeout_s: float = 60.0,
        bytes_per_s: float | None = None,
    ) -> tuple[int, float]:
        """Have another node hold a copy, too; it tells the controller itself.

        With a rate it takes so much longer, and no more of the network than that.

        Returns:
            Bytes of the shard, and seconds until all of it was there and verified.

        Raises:
            NotHeldError: if the shard is not held here.
            StaleError: if the other node is at a newer generation, or needs the step no more.
            CorruptError: if the other node received what does not match the index.
            UnreachableError: if it did not answer, or is not done after `timeout_s`, which
                includes the wait for its address.
            KeeperError: of another class, for what else the other node said.
        """
        shard = self._shelf.require(rank, step)
        if bytes_per_s is not None:
            timeout_s += shard.size / bytes_per_s
        with self._shelf.pinned(shard):
            try:
                async with asyncio.timeout(timeout_s):
                    address = await self._address(buddy)
                    lineage = self._shelf.lineage
                    here = self._address_here
                    names = (node for node, where in self._peers.items() if where == here)
                    began = time.monotonic()
                    await self._client.send(
                        address,
                        shard,
                        lineage,
                        bytes_per_s=bytes_per_s,
                        sender=next(names, UNNAMED),
                    )
                    if self.drag > 1:
                        await asyncio.sleep((self.drag - 1) * (time.monotonic() - began))
            except TimeoutError:
                raise UnreachableError(f"{shard} is not on {buddy} after {timeout_s:g} s") from None
            return shard.size, time.monotonic() - began

    async def prepare(
        self,
        rank: Rank,
        step: Step,
        source: str,
        durable: DurableShard | None = None,
        *,
        staged_as: Rank | None = None,
        timeout_s: float = 60.0,
    ) -> tuple[protocol.Restore, Tier]:
        """Have the shard that a rank restores from in this node's memory, verified.

        It is taken from here, if it is here: what is of another lineage than the generation's own
        was dropped when that began. Else it is taken from the node named by `source`; else, if that
        is "", from the durable tier. It stays until the rank stages or a generation begins.

        With both, `source` is the node that reads it from the durable tier for this one, too: it is
        waited for, and read here if it can not be had from there.

        Chunks that are not what was staged, be it that they went bad here or on their way from the
        other node, are brought anew: from the memory of a peer, or from the durable tier, if either
        has good ones.

        What another rank staged has the same bytes if that has the same shard, of another replica;
        `staged_as` says who did. If it is here, it is copied: its slot is that rank's to write to.
        What the rank itself staged is not taken then, if it is here: it may be the wrong state with
        the right checksums.

        Raises:
            CorruptError: if the bytes do not match the index, and can not be mended; what was here
                is dropped.
            NotHeldError: if it is not there, or its verification here took longer than `timeout_s`;
                it is dropped then, too.
            StaleError: if another generation began meanwhile.
            UnreachableError: if the other node did not answer, or not within `timeout_s`, which
                includes the wait for its address.
            KeeperError: of another class, for what else the other node said, or if memory is full.
            StorageError: if it was to come from the durable tier, and could not, or not in time.
        """
        began = self._shelf.lineage.generation
        as_rank = rank if staged_as is None else staged_as
        held = self._held(rank, step, as_rank)
        shared = durable is not None and bool(source)
        twin = self._shelf.find(as_rank, step) if source and not (held or shared) else None
        tier: Tier = "own" if held or twin else "fetched" if source else "durable"
        try:
            async with asyncio.timeout(timeout_s):
                if held is not None:
                    shard = await self.checking.verified(held, mend_s=timeout_s / 2)
                elif source and durable is not None:
                    shard, tier = await self._sharing.bring(
                        durable,
                        (rank, step),
                        (NodeId(source), as_rank),
                        timeout_s=timeout_s * WAIT_SHARE,
                    )
                elif twin is not None:
                    shard = await self._bringing.copied(twin, rank)
                elif source:
                    fetched = await self._bringing.fetched(
                        NodeId(source), (as_rank, step), mend_s=timeout_s / 2
                    )
                    shard = replace(fetched, rank=rank, staged_as=as_rank)
                elif durable is not None:
                    shard = await self._reading.read(durable, (rank, step))
                else:
                    raise NotHeldError(f"no source is named for rank {rank}, step {step}")
        except TimeoutError:
            raise self._late(
                rank, step, held or twin, "" if shared else source, timeout_s
            ) from None
        if held is None:
            self._shelf.put(shard)
        if self._shelf.lineage.generation != began or shard.dropped:
            raise StaleError(f"{shard}: this node is at {self._shelf.lineage} by now")
        self._shelf.lend(shard)
        return protocol.Restore(step=step, path=str(shard.path), index=shard.index), tier

    async def require(
        self, checkpoint: DurableCheckpoint, step: Step, *, timeout_s: float = 60.0
    ) -> None:
        """Check that a checkpoint is there and of a step; nothing of it is held here after that.

        Raises:
            StorageError: if its record can not be read, or not in time, or is of another step.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._reading.require(checkpoint, step)
        except TimeoutError:
            raise StorageUnavailableError(
                f"step {step}: timed out reading its record after {timeout_s:g} s"
            ) from None

    async def write(
        self,
        store: BlobStore,
        rank: Rank,
        step: Step,
        generation: Generation,
        *,
        timeout_s: float = 600.0,
    ) -> Written:
        """Make a shard durable. Its slot is not freed before the write is over, however it ends.

        Of each rank one is written at a time; until the one before is over, this one's slot may
        be freed, and then it can not be written any more.

        Raises:
            NotHeldError: if the shard is not held, or was not staged by that generation.
            StorageError: if it could not be written; StorageUnavailableError after `timeout_s`.
        """
        return await self._writing.write(store, rank, step, generation, timeout_s=timeout_s)

    async def write_turn(self, rank: Rank, *, timeout_s: float) -> None:
        """Wait until nothing of a rank is being written any more.

        Raises:
            StorageUnavailableError: after `timeout_s`; says what is being written.
        """
        await self._writing.turn(rank, timeout_s=timeout_s)

    # Inside -------------------------------------------------------------------------------

    def _held(self, rank: Rank, step: Step, staged_as: Rank) -> Shard | None:
        found = self._shelf.find(rank, step)
        as_wanted = found is not None and staged_as in (rank, found.staged_as)
        return found if as_wanted else None

    def _give_up(self, shard: Shard) -> None:
        """Drop what is of no use, and say so before anybody counts on it again."""
        if not shard.dropped:
            self._shelf.drop(shard)
            self.on_held(self._shelf.lineage.generation)

    def _late(
        self, rank: Rank, step: Step, held: Shard | None, source: str, timeout_s: float
    ) -> KeeperError | StorageUnavailableError:
        """Return what to say of a shard that is not ready in time."""
        wanted, after = f"rank {rank}, step {step}", f"after {timeout_s:g} s"
        if held is not None:
            self._give_up(held)
            return NotHeldError(f"{wanted}: timed out verifying what is here {after}; dropped")
        if source:
            return UnreachableError(f"{wanted}: timed out fetching it from {source} {after}")
        return StorageUnavailableError(
            f"{wanted}: timed out reading it from the durable tier {after}"
        )

    async def _address(self, node: NodeId) -> str:
        while node not in self._peers:
            await self._peers_changed.wait()
        return self._peers[node]

    def _freed(self, rank: Rank, slot: int) -> None:
        self.on_freed(rank, slot)
