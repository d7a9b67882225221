"""Sees staged shards on: a copy to the buddy node, and what is due to the durable tier."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from enum import Enum, auto
from typing import Any

import msgspec

from orchestrator.agent.durable import DurableTier
from orchestrator.agent.impressions import of_index
from orchestrator.agent.keeper import Keeper
from orchestrator.agent.links import LinkTimes
from orchestrator.agent.owed import Owed
from orchestrator.agent.ranks import Ranks
from orchestrator.agent.shards import KeeperError, NotHeldError, StaleError
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import BadCopy, Begin, Fact, WriteFailed
from orchestrator.protocol.rank import Persisted, Staged
from storage.errors import StorageError, StorageRefusedError

log = logging.getLogger(__name__)
COPY_AGAIN_S = (0.2, 0.5, 1.0, 2.0)
"""Pauses before a copy is tried again; a buddy may be starting, or out of reach for a moment."""
REPAIR_BYTES_PER_S = 256 << 20
"""Of copies that replace those that went bad, all of a node together: nobody waits for them, and
training has the network."""
WRITE_AGAIN_S = (0.5, 1.0, 2.0, 4.0)
"""Pauses before a write that the store gave up or refused is tried again; the last one repeats."""
WRITE_WITHIN_S = 3600.0
"""A write is given up after this at the latest: longer than any run waits for it at its end."""


class _Head(msgspec.Struct):
    model: str


# As in storage/shard.py: made before there are threads.
_read = msgspec.json.Decoder(_Head).decode


class _Went(Enum):
    """How a write went."""

    WELL = auto()
    MAYBE_LATER = auto()
    """The same write may go well later."""
    NOT = auto()


class Saving:
    """One node's. Nothing here keeps training waiting, and a failed save ends nothing.

    Args:
        node: its name.
        ranks: its processes, who are told what is durable.
        keeper: holds what they stage.
        say: sends a fact, and keeps it.

    Attributes:
        tier: where durable shards go; None if there is nowhere.
    """

    def __init__(
        self, node: NodeId, ranks: Ranks, keeper: Keeper, say: Callable[[Fact], None]
    ) -> None:
        self.tier: DurableTier | None = None
        self._node = node
        self._ranks, self._keeper, self._say = ranks, keeper, say
        self._owed, self._links = Owed(), LinkTimes(say)
        self._generation = Generation(0)
        self._buddy: NodeId | None = None
        self._begun: Begin | None = None
        self._due = Step(0)
        """Newest step that was staged here for the durable tier, in this generation."""
        self._waiting: dict[Rank, Staged] = {}
        """Per rank, what is to be written next."""
        self._writing: dict[Rank, asyncio.Task[None]] = {}
        self._copied: dict[Rank, tuple[str, Step]] = {}
        """Per rank, its newest copy elsewhere: address of the holder, and step."""
        self._lacking: set[Rank] = set()
        """Ranks of whose shard the buddy was found without a good copy."""
        keeper.checking.on_lacking.append(self._lacks)
        self._repairing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._full_since: dict[Rank, float] = {}

    def begin(self, order: Begin) -> None:
        """Save for the seats of a generation from now on; older saves are abandoned."""
        self.close()
        self._generation = order.generation
        self._begun, self._due = order, Step(0)
        self._waiting, self._writing = {}, {}
        self._lacking = set()
        buddy = order.buddies.get(self._node)
        self._buddy = buddy if buddy != self._node else None
        self._owed.begin(order, self._node)
        # What the generation abandons is dropped wherever it is held.
        back_to = Step(-1) if order.restore is None else order.restore
        self._copied = {rank: copy for rank, copy in self._copied.items() if copy[1] <= back_to}

    def leave(self) -> None:
        """Save nothing any more."""
        self.close()
        self._generation, self._begun = Generation(0), None

    def resumed(self) -> None:
        """Have the buddy hold what this generation continued from, where it does not already.

        What a lost node held for this one would else be in one memory only, until the next save;
        so would what it holds and was found bad.
        To be called when ranks train again, not before: copies take their time from a recovery.
        """
        order, buddy = self._begun, self._buddy
        if order is None or order.restore is None or buddy is None:
            return
        there = (order.peers.get(buddy, ""), order.restore)
        staged_as = order.staged_as or order.ranks
        for rank, seat, source, other in zip(
            order.ranks, order.seats, order.sources, staged_as, strict=True
        ):
            # Whoever a shard was fetched from has it still; so has who was sent our own of it.
            held = source == buddy or (source == seat and self._copied.get(rank) == there)
            held = held and rank == other
            if seat != self._node:
                continue
            if rank in self._lacking:
                self._start(self._repair(buddy, rank, order.restore))
            elif not held:
                self._start(self._copy(buddy, rank, order.restore))

    def save(self, rank: Rank, staged: Staged) -> None:
        """Send a shard that the keeper holds to where else it is needed."""
        if staged.generation != self._generation:
            return
        if self._buddy is not None:
            self._start(self._copy(self._buddy, rank, staged.step, timed=True))
        if not staged.durable:
            return
        self._due = max(self._due, staged.step)
        if self._owed.owes(rank):
            self._line_up(rank, staged)
        else:
            # Another replica writes the same shard; this rank has nothing to wait for.
            fact = self._owed.staged(rank, staged.step, of_index(staged.index))
            if fact is not None:
                self._say(fact)
            self._tell(rank, staged.step)

    def abandoned(self, rank: Rank, step: Step, reason: str) -> None:
        """Take note that a rank stages nothing of a step that others may have staged."""
        self._fail(step, f"rank {rank}: {reason}")

    def relieve(self, after_s: float) -> None:
        """Have each rank without a free slot for so long give up a step that does not get safe.

        A buddy may be out of reach for long, and not every trainer's ranks skip saves together.
        """
        now = time.monotonic()
        for rank in self._ranks.seated():
            if self._keeper.free_slots(rank):
                self._full_since.pop(rank, None)
            elif now - self._full_since.setdefault(rank, now) > after_s:
                del self._full_since[rank]
                if self._keeper.make_room(rank):
                    log.warning("rank %d had no free slot for %g s; made room", rank, after_s)

    def _lacks(self, bad: BadCopy) -> None:
        if bad.node == self._buddy:
            self._lacking.add(bad.rank)

    def close(self) -> None:
        """Abandon what is under way; a thread that writes already ends by itself."""
        for task in self._tasks:
            task.cancel()

    async def _repair(self, buddy: NodeId, rank: Rank, step: Step) -> None:
        """Copy at a bounded rate, one shard at a time, and once: it may have many gigabytes."""
        async with self._repairing:
            await self._copy(buddy, rank, step, pauses_s=(), bytes_per_s=REPAIR_BYTES_PER_S)

    async def _copy(
        self,
        buddy: NodeId,
        rank: Rank,
        step: Step,
        *,
        pauses_s: tuple[float, ...] = COPY_AGAIN_S,
        bytes_per_s: float | None = None,
        timed: bool = False,
    ) -> None:
        """Copy a shard. Timed, if nothing of it can be there before."""
        address = self._begun.peers.get(buddy, "") if self._begun is not None else ""
        for wait_s in (*pauses_s, None):
            try:
                size, took_s = await self._keeper.copy_to(
                    buddy, rank, step, bytes_per_s=bytes_per_s
                )
            except (NotHeldError, StaleError) as error:
                # Nobody needs it any more, here or there.
                log.info("rank %d, step %d is not copied to %s: %s", rank, step, buddy, error)
                return
            except KeeperError as error:
                log.warning("rank %d, step %d has no copy on %s: %s", rank, step, buddy, error)
                if wait_s is not None:
                    await asyncio.sleep(wait_s)
            else:
                self._copied[rank] = (address, step)
                if timed:
                    self._links.copied(self._generation, buddy, size, took_s)
                return

    def _line_up(self, rank: Rank, staged: Staged) -> None:
        """Write a shard when the one before is over; what was to be next till now is not written.

        Without that, a tier that takes long would hold ever more slots, and memory would get none.
        The last shard of a run is followed by none, and so is always written.
        """
        passed_over = self._waiting.get(rank)
        if passed_over is not None:
            self._fail(
                passed_over.step,
                f"rank {rank}: the durable tier was not done with an older step when step "
                f"{staged.step} was due",
            )
            self._tell(rank, passed_over.step, given_up=True)
        self._waiting[rank] = staged
        task = self._writing.get(rank)
        if task is None or task.done():
            self._writing[rank] = self._start(self._write_all(rank))

    async def _write_all(self, rank: Rank) -> None:
        while rank in self._waiting:
            try:
                await self._keeper.write_turn(rank, timeout_s=WRITE_WITHIN_S)
            except StorageError as error:
                step = self._waiting.pop(rank).step
                self._fail(step, f"rank {rank}: {error}")
                self._tell(rank, step, given_up=True)
            else:
                await self._write_or_tell(rank, self._waiting.pop(rank))

    async def _write_or_tell(self, rank: Rank, staged: Staged) -> None:
        """Make a shard durable; tell its rank if it is not, whatever kept it from that.

        A rank that waited for the answer for ever would have all ranks save nothing durable.
        """
        went = _Went.NOT
        try:
            went = await self._write(rank, staged)
        finally:
            if went is not _Went.WELL and staged.generation == self._generation:
                self._tell(rank, staged.step, given_up=True)

    async def _write(self, rank: Rank, staged: Staged) -> _Went:
        """Make a shard durable; try again what may succeed later, while nothing newer is due.

        So a store that fails or refuses for a while costs the checkpoints of that while, but not
        the last one of a run, which waits for it.
        """
        give_up_at = time.monotonic() + WRITE_WITHIN_S
        for pause_s in itertools.chain(WRITE_AGAIN_S, itertools.repeat(WRITE_AGAIN_S[-1])):
            went = await self._write_once(rank, staged)
            if went is not _Went.MAYBE_LATER:
                return went
            await asyncio.sleep(pause_s)
            if staged.step < self._due or time.monotonic() > give_up_at:
                break
        log.warning("rank %d, step %d is not written any more", rank, staged.step)
        return _Went.NOT

    async def _write_once(self, rank: Rank, staged: Staged) -> _Went:
        """Write a shard, and say how that went."""
        step, generation = staged.step, staged.generation
        if self.tier is None:
            self._fail(step, "there is no durable tier")
            return _Went.NOT
        try:
            written = await self._keeper.write(self.tier.store, rank, step, generation)
        except NotHeldError as error:
            why = "memory needed its slot before the durable tier took it"
            self._fail(step, f"rank {rank}: {why}: {error}")
            return _Went.NOT
        except KeeperError as error:
            self._fail(step, f"{type(error).__name__}: {error}")
            return _Went.NOT
        except StorageError as error:
            self._fail(step, f"{type(error).__name__}: {error}")
            # What is refused is granted once somebody has seen to the mount, the credentials or the
            # clock, and after the last save there is no later one that would do as well.
            later = error.retryable or isinstance(error, StorageRefusedError)
            return _Went.MAYBE_LATER if later else _Went.NOT
        self._tell(rank, step)
        model = _read(staged.index).model
        fact = self._owed.written(rank, step, written, model)
        if fact is not None:
            self._say(fact)
        return _Went.WELL

    def _fail(self, step: Step, reason: str) -> None:
        log.warning("step %d could not be written: %s", step, reason)
        if self._owed.failed(step):
            self._say(WriteFailed(generation=self._generation, step=step, reason=reason[:2000]))

    def _tell(self, rank: Rank, step: Step, *, given_up: bool = False) -> None:
        live = self._ranks.seated().get(rank)
        if live is not None:
            live.control.send(Persisted(step=step, given_up=given_up))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a save failed", exc_info=error)
