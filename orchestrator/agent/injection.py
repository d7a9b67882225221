"""Carries out planned faults on this node: for real, once each, and only when told to.

The agent says when one is due, the controller puts it on record, and then orders it. What ends
this process is reported before it is done; there is nobody to report it afterwards.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from orchestrator.agent import linux
from orchestrator.agent.account import Account
from orchestrator.agent.channel import Channel
from orchestrator.agent.durable import DurableTier
from orchestrator.agent.keeper import Keeper
from orchestrator.agent.live import LiveRank
from orchestrator.agent.memory import Memory
from orchestrator.agent.ranks import Ranks
from orchestrator.faults.catalogue import CATALOGUE
from orchestrator.faults.plan import ArmedFault, Fault
from orchestrator.protocol.agent import LOST_FOR, NODE_LOST_EXIT
from orchestrator.protocol.ids import NodeId, Rank
from orchestrator.protocol.messages import Fact, FaultCarriedOut, FaultDue
from orchestrator.protocol.rank import Misbehave
from storage.errors import StorageError

log = logging.getLogger(__name__)
FLUSH_WITHIN_S = 0.5
SLOW_PERIOD_S = 0.05
_FATAL = frozenset({"kill-agent", "lose-node", "partition-node"})
"""After these nothing can be said any more."""
_SIGNALS = {"kill-rank": signal.SIGKILL, "segfault-rank": signal.SIGSEGV}


class Impossible(Exception):  # noqa: N818 - an answer, not an error: it is reported as `problem`
    """The fault can not happen here now."""


class Injection:
    """The faults of one node.

    Args:
        node: its name.
        work: its folder on disk.
        memory: its folder in shared memory.
        ranks: its processes.
        keeper: what it holds for itself and others.
        channel: to its controller.
        account: what generation it is in.
        tier: returns its way to the durable tier, None before there is one.
        say: sends a fact, and keeps it.
    """

    def __init__(  # noqa: PLR0913 - a fault may hit every part of a node
        self,
        node: NodeId,
        *,
        work: Path,
        memory: Memory,
        ranks: Ranks,
        keeper: Keeper,
        channel: Channel,
        account: Account,
        tier: Callable[[], DurableTier | None],
        say: Callable[[Fact], None],
    ) -> None:
        self._node, self._work, self._memory = node, work, memory
        self._ranks, self._keeper, self._channel = ranks, keeper, channel
        self._account, self._tier, self._say = account, tier, say
        self._known: dict[int, Fault] = {}
        self._watched_for: frozenset[int] = frozenset()
        self._due: set[int] = set()
        self._done: set[int] = set()
        self._lasting: set[asyncio.Task[None]] = set()

    @property
    def watching(self) -> bool:
        """Whether the steps of ranks decide on anything."""
        return not self._watched_for <= self._due

    def arm(self, faults: Iterable[dict[str, Any]]) -> None:
        """Watch for these from now on; raises msgspec.ValidationError if they are none."""
        found = [msgspec.convert(fault, ArmedFault) for fault in faults]
        # What is not named any more is remembered: the order to carry it out may be on its way.
        self._known |= {f.index: f.fault for f in found}
        self._watched_for = frozenset(f.index for f in found) - self._done

    def look(self) -> None:
        """Report what is due as of now, each once."""
        for index in sorted(self._watched_for - self._due):
            if self._is_due(self._known[index]):
                self._due.add(index)
                self._say(FaultDue(index=index))

    async def carry_out(self, index: int) -> None:
        """Carry out one fault, and say so; a second order does nothing."""
        if index in self._done:
            return
        self._done.add(index)
        self._account.fault_answered(index)
        self._due.add(index)
        fault = self._known.get(index)
        if fault is None:
            self._say(FaultCarriedOut(index=index, problem=f"{self._node} was not told of it"))
            return
        log.warning("fault plan: %s", fault.describe())
        if fault.fault in _FATAL:
            self._say(FaultCarriedOut(index=index))
            await self._channel.flush(FLUSH_WITHIN_S)
        problem = ""
        try:
            await self._let_loose(fault)
        except (Impossible, StorageError, OSError) as error:
            problem = f"{type(error).__name__}: {error}"
            log.warning("fault plan: %s: %s", fault.describe(), problem)
        if fault.fault not in _FATAL:
            self._say(FaultCarriedOut(index=index, problem=problem))

    def close(self) -> None:
        """End what lasts, so that every process can act on a signal again."""
        for task in self._lasting:
            task.cancel()

    # When ---------------------------------------------------------------------------------------

    def _is_due(self, fault: Fault) -> bool:
        """Whether the target has completed the step. What the clock decides is the world's."""
        if fault.when.step is None or CATALOGUE[fault.fault].target == "controller":
            return False
        live = self._watched(fault)
        reading = live.read() if live is not None else None
        return (
            reading is not None
            and reading.generation == self._account.generation
            and reading.step >= fault.when.step
        )

    def _watched(self, fault: Fault) -> LiveRank | None:
        """Return the rank whose steps count for a fault, if it is one of ours."""
        seated = self._ranks.seated()
        if fault.rank is not None and fault.node is None:
            return seated.get(Rank(fault.rank))
        if CATALOGUE[fault.fault].target == "rank":
            return seated.get(Rank(fault.rank)) if fault.rank is not None else None
        return next(iter(seated.values()), None) if fault.node == self._node else None

    # What ---------------------------------------------------------------------------------------

    async def _let_loose(  # noqa: C901, PLR0912 - one case per fault
        self, fault: Fault
    ) -> None:
        match fault.fault:
            case "kill-rank" | "segfault-rank":
                # To the rank alone: its children are for us to find.
                os.kill(self._target(fault).pid, _SIGNALS[fault.fault])
            case "exit-rank":
                self._target(fault).control.send(Misbehave(how="exception"))
            case "spin-rank":
                how = "spin-holding-gil" if fault.hold_gil else "spin"
                self._target(fault).control.send(Misbehave(how=how))
            case "block-rank":
                self._target(fault).control.send(Misbehave(how="block"))
            case "skip-collective" | "mismatch-collective":
                order = Misbehave(how=fault.fault, options={"at": "sum of gradients"})
                self._target(fault).control.send(order)
            case "throttle-rank":
                self._target(fault).control.send(Misbehave(how="throttle", options=fault.slowdown))
            case "overload-rank":
                self._target(fault).control.send(Misbehave(how=fault.fault, options=fault.slowdown))
            case "stall-data":
                self._target(fault).control.send(Misbehave(how=fault.fault, options=fault.stall))
            case "flip-bit":
                self._target(fault).control.send(Misbehave(how=fault.fault, options=fault.flip))
            case "wrong-matmul":
                self._target(fault).control.send(Misbehave(how=fault.fault, options=fault.wrong))
            case "freeze-rank":
                self._last(_freeze(self._target(fault), fault.lasts_s))
            case "slow-rank":
                self._last(_slow(self._target(fault), fault.runs_share, fault.lasts_s))
            case "partition-node":
                self._last(self._partition(fault.lasts_s))
            case "slow-link":
                self._last(self._slow_link(fault.drag, fault.lasts_s))
            case "kill-agent":
                os.kill(os.getpid(), signal.SIGKILL)
            case "lose-node":
                self._lose_node(fault.lasts_s)
            case "full-disk":
                self._durable().fill(fault.lasts_s)
            case "read-only-disk":
                self._durable().forbid(fault.lasts_s)
            case "slow-disk":
                self._durable().slow_down(fault.delay_s, fault.lasts_s)
            case "corrupt-shard":
                where = await asyncio.to_thread(self._durable().corrupt_newest)
                log.warning("fault plan: %s", where)
            case "kill-controller":
                raise Impossible("the controller carries that out itself")

    def _target(self, fault: Fault) -> LiveRank:
        live = self._ranks.seated().get(Rank(fault.rank)) if fault.rank is not None else None
        if live is None:
            raise Impossible(f"rank {fault.rank} has no process on {self._node} now")
        return live

    def _durable(self) -> DurableTier:
        tier = self._tier()
        if tier is None:
            raise Impossible("there is no durable tier")
        return tier

    def _last(self, fault: Any) -> None:  # noqa: ANN401 - a coroutine of whatever kind
        task: asyncio.Task[None] = asyncio.create_task(fault)
        self._lasting.add(task)
        task.add_done_callback(self._lasting.discard)

    async def _partition(self, lasts_s: float | None) -> None:
        self._keeper.unreachable = True
        self._channel.set_reachable(on=False)
        if lasts_s is None:
            return
        await asyncio.sleep(lasts_s)
        self._keeper.unreachable = False
        self._channel.set_reachable(on=True)

    async def _slow_link(self, times: float, lasts_s: float | None) -> None:
        self._keeper.drag = times
        if lasts_s is not None:
            await asyncio.sleep(lasts_s)
            self._keeper.drag = 1.0

    def _lose_node(self, lasts_s: float | None) -> None:
        if lasts_s is not None:
            # Whoever starts agents gives the node back after that.
            (self._work / LOST_FOR).write_text(repr(lasts_s), encoding="ascii")
        self._ranks.kill_all()
        linux.end_strays(spared=())
        self._memory.remove()
        os._exit(NODE_LOST_EXIT)


async def _freeze(live: LiveRank, lasts_s: float | None) -> None:
    live.signal(signal.SIGSTOP)
    if lasts_s is not None:
        try:
            await asyncio.sleep(lasts_s)
        finally:
            live.signal(signal.SIGCONT)


async def _slow(live: LiveRank, share: float, lasts_s: float | None) -> None:
    """Stop a process for part of every period, until it ends or `lasts_s` is over."""
    end = time.monotonic() + lasts_s if lasts_s is not None else float("inf")
    try:
        while not live.gone.is_set() and time.monotonic() < end:
            live.signal(signal.SIGSTOP)
            await asyncio.sleep(SLOW_PERIOD_S * (1 - share))
            live.signal(signal.SIGCONT)
            await asyncio.sleep(SLOW_PERIOD_S * share)
    finally:
        live.signal(signal.SIGCONT)
