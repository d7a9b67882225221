"""Takes a node into a generation: out of the old one, state into memory, processes onto seats.

Leaving and preparing state go on side by side, and no step waits for another node. Entering may be
cancelled at any point by a newer generation, which finds every process where it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

from orchestrator.agent.account import CLEARED, SEATED, Account
from orchestrator.agent.durable import DurableCheckpoint, DurableShard, DurableTier
from orchestrator.agent.exits import not_seated
from orchestrator.agent.keeper import Keeper
from orchestrator.agent.live import LiveRank
from orchestrator.agent.ranks import Ranks
from orchestrator.agent.shards import (
    CorruptError,
    KeeperError,
    MalformedError,
    NoRoomError,
    NotHeldError,
    StaleError,
    UnreachableError,
)
from orchestrator.protocol.agent import AgentConfig
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import (
    Announce,
    BadCopy,
    Begin,
    Fact,
    FailedCopy,
    MendedCopy,
    NodeUnusable,
    PreparationFailed,
    Prepared,
    SaveEvery,
    Welcome,
)
from orchestrator.protocol.rank import Rendezvous, Restore, Seat, Whole
from orchestrator.protocol.rank import SaveEvery as RankSaveEvery
from orchestrator.protocol.timeouts import Timeouts
from storage.errors import StorageError
from storage.wrappers import CountingStore

log = logging.getLogger(__name__)
FETCH_AGAIN_S = (0.2, 0.5, 1.0, 2.0)
"""Pauses before a copy is asked for again at a node that did not answer."""
Restores = dict[Rank, Restore | None]


class Seating:
    """One node's.

    Args:
        config: of the agent.
        ranks: its processes.
        keeper: its memory.
        account: what it has to say.
        say: sends a fact, and keeps it.
        settled: returns when ranks may be moved on, since nobody looks at them any more.

    Attributes:
        cache: where this node's ranks keep what is expensive to derive.
    """

    def __init__(
        self,
        config: AgentConfig,
        ranks: Ranks,
        *,
        keeper: Keeper,
        account: Account,
        say: Callable[[Fact], None],
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self._config = config
        self._ranks, self._keeper, self._account, self._say = ranks, keeper, account, say
        self._settled = settled
        self._announced: Announce | None = None
        self._mended: list[MendedCopy] = []
        """Since a preparation was told of: also what was mended for a peer, or for a generation
        that was over before it was prepared."""
        self._lacking: list[BadCopy] = []
        """The same of what other nodes were found to have no good copy of."""
        keeper.checking.on_mended = self._mended.append
        keeper.checking.on_lacking.append(self._lacking.append)
        self.cache = Path(config.work) / "cache"

    async def enter(self, order: Begin, terms: Welcome, tier: DurableTier | None) -> None:
        """Enter the generation of `order`, in which ranks of this node have seats."""
        clearing = asyncio.create_task(self.clear(order.generation, order, terms.timeouts))
        preparing = asyncio.create_task(self._prepare(order, tier, terms.timeouts))
        try:
            if not await clearing:
                return
            self._advance(CLEARED)
            restores = await preparing
            if restores is None:
                return
            self._ranks.park_rest(restores, order.generation)
            if await self._seat_all(order, terms, restores):
                self._advance(SEATED)
        finally:
            clearing.cancel()
            preparing.cancel()

    async def clear(self, generation: Generation, order: Begin | None, limits: Timeouts) -> bool:
        """End every older generation here; return whether that is done.

        What can not be ended makes the node unusable: it may hold a device, or write to memory.
        """
        dismiss = frozenset(order.dismiss) if order else frozenset()
        await self._settled()
        stuck = await self._ranks.clear(generation, dismiss, limits)
        if stuck:
            self._say(NodeUnusable(reason=_survivors(stuck, limits)))
            return False
        self._keeper.seat(self._account.ranks)
        if order is None:
            self._ranks.park_rest((), generation)
        return True

    def announce(self, order: Announce) -> None:
        """Pass on where the store of a generation listens, also to those who are seated later."""
        if self._announced is None or order.generation >= self._announced.generation:
            self._announced = order
            for live in self._ranks.seated().values():
                self._introduce(live)

    def pass_on(self, order: SaveEvery) -> None:
        """Tell rank 0, if it is here, how often the world is to save."""
        live = self._ranks.seated().get(Rank(0))
        if live is not None and live.seat and live.seat.generation == order.generation:
            live.control.send(RankSaveEvery(generation=order.generation, cadence=order.cadence))

    def _introduce(self, live: LiveRank) -> None:
        known, seat = self._announced, live.seat
        if known is not None and seat is not None and known.generation == seat.generation:
            live.control.send(Rendezvous(generation=known.generation, address=known.address))

    def _advance(self, mark: int) -> None:
        fact = self._account.advance(mark)
        if fact is not None:
            self._say(fact)

    # State ----------------------------------------------------------------------------------------

    async def _prepare(
        self, order: Begin, tier: DurableTier | None, limits: Timeouts
    ) -> Restores | None:
        """Bring the state of every rank here; None, and a fact, if that is not possible."""
        ranks = self._account.ranks
        if order.restore is None:
            return dict.fromkeys(ranks)
        begun = time.monotonic()
        # No phase of a recovery is given up before `form_s`.
        self._keeper.checking.mend_s = 0.8 * limits.form_s
        store = CountingStore(tier.store) if tier is not None else None
        self._keeper.checking.store = store
        failed: list[FailedCopy] = []
        checkpoint = DurableCheckpoint(store, order.commit) if order.commit and store else None
        bringing = partial(self._prepare_one, order, order.restore, checkpoint, limits, failed)
        if order.cut_anew and tier is not None and checkpoint is not None:
            bringing = partial(self._point_out, checkpoint, tier.uri, order.restore, limits)
        tasks = [asyncio.create_task(bringing(rank)) for rank in ranks]
        try:
            found = await asyncio.gather(*tasks)
        except StaleError as error:
            log.info("preparation is over: %s", error)
            return None
        except Exception as error:
            # Also what nobody thought of is told: a node that says nothing looks like one that
            # hangs, and is started again for ever.
            known = isinstance(error, KeeperError | StorageError | OSError)
            kept = isinstance(error, KeeperError)
            durable = isinstance(error, StorageError) or (bool(order.commit) and not kept)
            log.warning(
                "state of step %d is not to be had: %s", order.restore, error, exc_info=not known
            )
            self._say(
                PreparationFailed(
                    generation=order.generation,
                    step=order.restore,
                    tier="durable" if durable else "memory",
                    reason=f"{type(error).__name__}: {error}"[:2000],
                    copies=(*failed, *self._found_bad(order.restore)),
                )
            )
            return None
        finally:
            for task in tasks:
                task.cancel()
        restores: Restores = {
            rank: restore for rank, (restore, _) in zip(ranks, found, strict=True)
        }
        if order.cut_anew:
            return restores  # nothing is in memory, so there is nothing to say of that
        tiers = [where for _, where in found]
        mended, lacking = tuple(self._mended), tuple(self._lacking)
        self._mended.clear()
        self._lacking.clear()
        self._say(
            Prepared(
                generation=order.generation,
                step=order.restore,
                own=tiers.count("own"),
                fetched=tiers.count("fetched"),
                durable=tiers.count("durable"),
                reads=store.reads if store is not None else 0,
                seconds=time.monotonic() - begun,
                mended=mended,
                lacking=lacking,
            )
        )
        return restores

    async def _prepare_one(
        self,
        order: Begin,
        step: Step,
        checkpoint: DurableCheckpoint | None,
        limits: Timeouts,
        failed: list[FailedCopy],
        rank: Rank,
    ) -> tuple[Restore, str]:
        """Bring the state of one rank here; enter in `failed` from which copy it was not to be had.

        A copy here that is bad was dropped with that, so it is looked for elsewhere. A node out of
        reach may be so for a moment only.
        """
        place = order.ranks.index(rank)
        source = order.sources[place]
        staged_as = order.staged_as[place] if order.staged_as else rank
        durable = None if checkpoint is None else DurableShard(checkpoint, order.shard_of[place])
        give_up_at = time.monotonic() + limits.warmup_s
        pauses_s = iter(FETCH_AGAIN_S)
        while True:
            node = self._config.node
            held = self._keeper.holds(rank, step, staged_as)
            holder = node if held else NodeId(source)
            left_s = give_up_at - time.monotonic()
            try:
                return await self._keeper.prepare(
                    rank,
                    step,
                    source,
                    durable,
                    staged_as=staged_as,
                    timeout_s=left_s,
                )
            except KeeperError as error:
                again_s = _again_s(error, pauses_s, elsewhere=holder == node != source)
                if again_s is None or time.monotonic() + again_s > give_up_at:
                    failed += _failed(error, holder, node, rank if held else staged_as)
                    raise
                log.warning("%s; trying %s", error, source or "the durable tier")
                await asyncio.sleep(again_s)

    async def _point_out(
        self, checkpoint: DurableCheckpoint, uri: str, step: Step, limits: Timeouts, _: Rank
    ) -> tuple[Restore, str]:
        """Have a rank read what is its own of a checkpoint that is cut otherwise."""
        await self._keeper.require(checkpoint, step, timeout_s=limits.warmup_s)
        whole = Whole(uri=uri, commit=checkpoint.commit)
        return Restore(step=step, path="", index="", whole=whole), "durable"

    def _found_bad(self, step: Step) -> list[FailedCopy]:
        """Return the copies elsewhere that something was to be mended from, and were no good."""
        return [
            FailedCopy(bad.node, bad.rank, "corrupt") for bad in self._lacking if bad.step == step
        ]

    # Seats ----------------------------------------------------------------------------------------

    async def _seat_all(self, order: Begin, terms: Welcome, restores: Restores) -> bool:
        """Give every rank its process; return whether all have one. If not, a fact says why."""
        seats = [self._seat_one(order, terms, rank, restore) for rank, restore in restores.items()]
        outcomes = await asyncio.gather(*seats, return_exceptions=True)
        for rank, error in zip(restores, outcomes, strict=True):
            if isinstance(error, Exception):
                # Whatever it is: a controller that hears nothing takes this node for hanging.
                log.warning("rank %d has no process: %s: %s", rank, type(error).__name__, error)
                step = order.restore or Step(0)
                self._say(not_seated(error, self._config.entrypoint, order.generation, rank, step))
                return False
            if error is not None:
                raise error
        return True

    async def _seat_one(
        self, order: Begin, terms: Welcome, rank: Rank, restore: Restore | None
    ) -> None:
        """Seat the process that had this rank before, or one that stands by."""
        self.cache.mkdir(parents=True, exist_ok=True)
        live = self._ranks.seated().get(rank)
        if live is None or live.dismissed:
            live = await self._ranks.take()
        # Made now, not before: while this rank waited for a process, slots may have become free.
        live.take(self._seat(order, terms, rank, restore))
        self._introduce(live)

    def _seat(self, order: Begin, terms: Welcome, rank: Rank, restore: Restore | None) -> Seat:
        return Seat(
            generation=order.generation,
            rank=rank,
            world_size=order.world_size,
            local_rank=self._account.ranks.index(rank),
            node=self._config.node,
            run_id=terms.run_id,
            job=terms.job,
            restore=restore,
            cadence=order.cadence,
            watched=order.watched,
            free_slots=self._keeper.free_slots(rank),
            cache_dir=str(self.cache),
            log=str(Path(self._config.logs) / f"rank-{rank:05d}.log"),
            abort_within_s=terms.timeouts.abort_s,
            persist_within_s=terms.timeouts.persist_s,
            save_within_s=terms.timeouts.save_s,
            collective_timeout_s=terms.timeouts.collective_s,
        )


def _again_s(error: KeeperError, pauses_s: Iterator[float], *, elsewhere: bool) -> float | None:
    """Return after how many seconds to try again; None if that can not help."""
    if elsewhere and isinstance(error, CorruptError):
        return 0.0
    return next(pauses_s, None) if isinstance(error, UnreachableError) else None


def _failed(error: KeeperError, holder: NodeId, node: NodeId, rank: Rank) -> list[FailedCopy]:
    """Return what an error says about the copy that `holder` was to have; nothing, if nothing."""
    match error:
        case NoRoomError():
            return [FailedCopy(node, rank, "no-room")]
        case CorruptError() | MalformedError():
            return [FailedCopy(holder, rank, "corrupt")]
        case NotHeldError():
            return [FailedCopy(holder, rank, "absent")]
        case StaleError():
            return []
        case _:
            return [FailedCopy(holder, rank, "unreachable")]


def _survivors(stuck: list[LiveRank], limits: Timeouts) -> str:
    pids = ", ".join(str(live.pid) for live in stuck)
    return f"process {pids} is still there {limits.kill_s:g} s after SIGKILL"
