"""The agent: takes orders and what ranks say, answers with facts.

One event loop, one thread; what may wait is a task of its own and has a bound. Orders repeat and
connections break, so each order leads to the same state however often it comes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from orchestrator.agent import linux, pulse
from orchestrator.agent.account import Account
from orchestrator.agent.channel import Channel, RefusedError
from orchestrator.agent.devices import Gpu, gpus_of
from orchestrator.agent.durable import DurableTier
from orchestrator.agent.hardware import Hardware
from orchestrator.agent.hearing import Hearing
from orchestrator.agent.identity import identity
from orchestrator.agent.injection import Injection
from orchestrator.agent.keeper import Keeper
from orchestrator.agent.memory import Memory
from orchestrator.agent.nursery import Nursery
from orchestrator.agent.parking import Parking
from orchestrator.agent.preflight import preflight
from orchestrator.agent.ranks import Ranks
from orchestrator.agent.saving import Saving
from orchestrator.agent.seating import Seating
from orchestrator.agent.stacks import Inspector
from orchestrator.agent.threads import DaemonThreads
from orchestrator.agent.voice import Voice
from orchestrator.protocol import rank as rank_protocol
from orchestrator.protocol.agent import AgentConfig
from orchestrator.protocol.ids import Rank
from orchestrator.protocol.messages import (
    Announce,
    Arm,
    Begin,
    CarryOut,
    Farewell,
    Fence,
    Inspect,
    Preflight,
    Probe,
    Retain,
    SaveEvery,
    ToAgent,
    Welcome,
)
from orchestrator.protocol.rank import (
    JobAhead,
    SlotFreed,
)
from orchestrator.protocol.timeouts import DEFAULTS, Timeouts
from storage.errors import UnsupportedUriError

log = logging.getLogger(__name__)

EXIT_ABANDONED = 69
"""EX_UNAVAILABLE: no controller for very long, and no rank moves either."""
EXIT_REFUSED = 77
"""EX_NOPERM: the controller does not take our token."""
LOOK_S = 0.5
"""Beacons are read at least this often; they keep 256 steps, so none of 2 ms is missed."""
SWEEP_S = 2.0
STRAYS_S = 0.005
"""While killed orphans are awaited, they are looked for this often."""


class Node:
    """One node's agent.

    Args:
        config: who it is.
        memory: its claimed folder in shared memory.
        nursery: forks its ranks.
        boards: the GPUs of its machine, as far as the driver's library tells of them.
    """

    def __init__(
        self, config: AgentConfig, memory: Memory, nursery: Nursery, boards: Sequence[Gpu] = ()
    ) -> None:
        self._config, self._memory, self._nursery = config, memory, nursery
        self._account = Account()
        self._keeper = Keeper(memory.path, token=config.token, host=config.host)
        self._keeper.on_freed = self._freed
        self._ranks = Ranks(nursery, memory=memory.path, idle_log=Path(config.work) / "parked.log")
        # One beside those with seats; on a node without, one for every seat there could be.
        self._parking = Parking(self._ranks, lambda: 1 if self._account.ranks else config.ranks)
        self._channel = Channel(
            config,
            joined=lambda: self._voice.joined(self._peer_address),
            welcomed=self._welcomed,
            obey=self._obey,
        )
        gpus = gpus_of(config.ranks, os.environ, boards=boards)
        self._identity = identity(config, gpus)
        if self._identity.unknown:
            log.warning("not all devices of this node are known: %s", self._identity.unknown)
        self._voice = Voice(
            config,
            self._account,
            self._ranks,
            keeper=self._keeper,
            channel=self._channel,
            identity=self._identity,
        )
        self._keeper.on_held = self._voice.say_held
        self._inspector = Inspector()
        self._seating = Seating(
            config,
            self._ranks,
            keeper=self._keeper,
            account=self._account,
            say=self._voice.say,
            settled=self._inspector.settled,
        )
        self._saving = Saving(config.node, self._ranks, self._keeper, self._voice.say)
        self._hearing = Hearing(
            self._ranks,
            keeper=self._keeper,
            account=self._account,
            parking=self._parking,
            saving=self._saving,
            say=self._voice.say,
            start=self._start,
        )
        self._ranks.on_heard, self._ranks.on_ended = self._hearing.heard, self._hearing.ended
        self._injection = Injection(
            config.node,
            work=Path(config.work),
            memory=memory,
            ranks=self._ranks,
            keeper=self._keeper,
            channel=self._channel,
            account=self._account,
            tier=lambda: self._tier,
            say=self._voice.say,
        )
        self._hardware = Hardware(config, gpus, self._identity, self._voice.say)
        self._testing = DaemonThreads(1, "preflight")
        self._terms: Welcome | None = None
        self._tier: DurableTier | None = None
        self._peer_address = ""
        self._swept_at = time.monotonic()
        self._entering: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    # Life ---------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Live until farewell, or `end`; return the exit code. Leaves no process and no memory."""
        self._peer_address = await self._keeper.open()
        channel = self._start(self._call())
        self._start(self._watch())
        self._start(self._parking.refill())
        code = await self._exit
        if self._entering is not None:
            self._entering.cancel()
        self._injection.close()
        self._saving.close()
        self._hardware.close()
        self._inspector.close()
        self._testing.shutdown()
        # Before the ranks are ended: none is born any more that nobody would know of.
        self._nursery.close()
        stuck = await self._ranks.end_all(self._limits)
        for live in stuck:
            log.error("process %d survived SIGKILL", live.pid)
        await self._end_strays({live.pid for live in stuck})
        await self._keeper.close()
        self._memory.remove()
        # Last of all: to the controller an open connection is a node that has not gone.
        channel.cancel()
        await asyncio.wait([channel], timeout=1.0)
        return code

    def end(self, code: int, reason: str) -> None:
        """End this agent and everything of it. A second call changes nothing."""
        if not self._exit.done():
            log.info("ending: %s", reason)
            self._exit.set_result(code)

    async def _end_strays(self, spared: set[int]) -> None:
        """End what the dead left behind, and what comes to us when those die in turn."""
        deadline = time.monotonic() + self._limits.kill_s
        while set(linux.children()) - spared and time.monotonic() < deadline:
            linux.end_strays(spared)
            await asyncio.sleep(STRAYS_S)

    async def _call(self) -> None:
        try:
            await self._channel.run()
        except RefusedError as error:
            self.end(EXIT_REFUSED, f"{error}; hint: {error.hint}")

    async def _watch(self) -> None:
        """Look at beacons, beat, and notice when there is nobody left to work for."""
        beat_at = time.monotonic()
        while True:
            now = time.monotonic()
            due = now >= beat_at
            if due:
                beat_at = now + self._limits.beat_s
            try:
                self._look(now, beat=due)
            except Exception:
                # Whatever a rank has done to its beacon: a node that does not beat is lost.
                log.exception("looking at the ranks")
                await asyncio.sleep(self._limits.beat_s)
            # Only a planned fault is in a hurry; beacons keep the steps until we come.
            look_s = self._limits.scan_s if self._injection.watching else LOOK_S
            await asyncio.sleep(min(max(beat_at - time.monotonic(), 0.001), look_s))

    def _look(self, now: float, *, beat: bool) -> None:
        if self._injection.watching:
            self._injection.look()
        pulse.collect(self._account, self._ranks)
        if beat:
            self._saving.relieve(self._limits.silence_s)
        if beat:
            self._hardware.look(now)
        if beat and self._channel.connected:
            self._voice.beat()
        elif beat:
            self._end_if_abandoned(now)
        if now - self._swept_at > SWEEP_S:
            self._swept_at = now
            self._ranks.reap_strays()

    def _end_if_abandoned(self, now: float) -> None:
        limit_s = self._limits.collective_s
        moved_at = pulse.newest_move_ns(self._ranks) / 1e9
        if now - self._channel.heard_at > limit_s and now - moved_at > limit_s:
            self.end(EXIT_ABANDONED, f"no controller and no progress for {limit_s:g} s")

    @property
    def _limits(self) -> Timeouts:
        return self._terms.timeouts if self._terms is not None else DEFAULTS

    # The controller -----------------------------------------------------------------------------

    def _welcomed(self, terms: Welcome) -> None:
        """Take the terms of the run; say again what may have been lost with the last connection."""
        if self._terms is None or self._terms.checkpoint_uri != terms.checkpoint_uri:
            self._open_tier(terms.checkpoint_uri)
        self._terms, self._voice.limits = terms, terms.timeouts
        self._ranks.foresee(JobAhead(job=terms.job, cache_dir=str(self._seating.cache)))
        self._voice.repeat(terms.steps_known)

    def _open_tier(self, uri: str) -> None:
        if self._tier is not None:
            self._tier.close()
        try:
            self._tier = DurableTier(uri)
        except UnsupportedUriError as error:
            self._tier = None
            log.error("no durable tier: %s; hint: %s", error, error.hint)  # noqa: TRY400 - one line
        self._saving.tier = self._tier

    def _obey(self, order: ToAgent) -> None:
        """Carry out an order. One that fails is logged: the next may be the one that helps."""
        try:
            self._carry_out(order)
        except Exception:
            log.exception("order %s", type(order).__name__)

    def _carry_out(self, order: ToAgent) -> None:  # noqa: C901, PLR0912 - one case per order
        match order:
            case Begin():
                self._begin(order)
            case Announce(generation=generation):
                if generation >= self._account.generation:
                    self._seating.announce(order)
            case Fence(generation=generation):
                if generation > self._account.generation:
                    self._leave(order)
            case Retain(generation=generation, step=step):
                if generation >= self._account.generation:
                    self._account.confirm(step)
                    self._keeper.retain(step)
            case SaveEvery():
                self._seating.pass_on(order)
            case Farewell(reason=reason):
                self.end(0, reason)
            case Arm(faults=faults):
                self._injection.arm(faults)
            case Probe():
                self._probe(order)
            case Inspect(generation=generation):
                if generation == self._account.generation:
                    self._start(self._inspect(order))
            case Preflight():
                self._start(self._preflight(order))
            case CarryOut(index=index):
                self._start(self._injection.carry_out(index))
            case Welcome():
                log.warning("a second welcome is ignored")

    def _probe(self, order: Probe) -> None:
        """Have ranks of ours measure how fast they are, as soon as their step is over."""
        seated = self._ranks.seated()
        if order.generation != self._account.generation:
            return
        for rank, begins_s in zip(order.ranks, order.begins_s, strict=True):
            if rank in seated:
                asked = rank_protocol.Probe(
                    generation=order.generation,
                    number=order.number,
                    within_s=order.within_s,
                    begins_s=begins_s,
                )
                seated[rank].control.send(asked)

    async def _inspect(self, order: Inspect) -> None:
        pids = {rank: live.pid for rank, live in self._ranks.seated().items()}
        if pids:
            seen = await self._inspector.look(order, pids)
            # Not kept to be said again: by then its generation is over, and that would be for ever.
            self._channel.send(seen)

    async def _preflight(self, order: Preflight) -> None:
        # In a thread: products let others run meanwhile, and nobody waits for them at the end.
        loop = asyncio.get_running_loop()
        came = await loop.run_in_executor(
            self._testing, preflight, self._identity.devices, order.serials, order.within_s
        )
        log.info("preflight: %d answers; %s", came.compared, came.wrong or came.problem or "right")
        self._channel.send(came)

    def _begin(self, order: Begin) -> None:
        generation = order.generation
        if generation < self._account.generation or self._terms is None:
            return
        if generation == self._account.generation:
            self._keeper.begin(generation, order.peers, order.restore, order.ancestors)
            return
        ranks = order.ranks_of(self._config.node)
        if not ranks:
            self._leave(order)
            return
        log.info("generation %d begins, from step %s", generation, order.restore)
        self._account.begin(generation, ranks)
        # Before any old rank is gone: what it still stages is of a generation that is over.
        self._keeper.begin(generation, order.peers, order.restore, order.ancestors)
        self._saving.begin(order)
        self._enter(self._seating.enter(order, self._terms, self._tier))

    def _leave(self, order: Begin | Fence) -> None:
        """Stop every rank of an older generation; what memory has of its lineage stays."""
        generation = order.generation
        log.info("no seat in generation %d", generation)
        self._account.begin(generation, ())
        if order.ancestors is not None:
            self._keeper.pass_by(generation, order.restore, order.ancestors)
        self._saving.leave()

        async def clear() -> None:
            await self._seating.clear(generation, None, self._limits)
            await self._parking.refill()

        self._enter(clear())

    def _enter(self, work: Coroutine[Any, Any, None]) -> None:
        if self._entering is not None:
            self._entering.cancel()
        self._entering = self._start(work)

    # Memory -------------------------------------------------------------------------------------

    def _freed(self, rank: Rank, slot: int) -> None:
        live = self._ranks.seated().get(rank)
        if live is not None and live.seat and live.seat.generation == self._account.generation:
            live.control.send(SlotFreed(slot=slot))

    # Tasks --------------------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task failed", exc_info=error)
