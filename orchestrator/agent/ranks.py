"""The processes of this node that are ranks, were, or stand by to be.

A process is *parked* (waits for a seat), *seated*, or has ended. It leaves its seat by saying so
when it is told to, by ending, or by being killed when it does neither in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path

from orchestrator.agent import linux
from orchestrator.agent.control import Control
from orchestrator.agent.live import LiveRank
from orchestrator.agent.nursery import Nursery
from orchestrator.agent.process import GROUP_WITHIN_S, RankProcess
from orchestrator.protocol.ids import Generation, Rank
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import (
    BEACON_VARIABLE,
    CONTROL_FD_VARIABLE,
    MEMORY_VARIABLE,
    STAND_BY_VARIABLE,
    Died,
    FromRank,
    JobAhead,
    Retire,
)
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worker.beacon import create

log = logging.getLogger(__name__)


class Ranks:
    """All of them.

    Args:
        nursery: forks them.
        memory: this node's folder in shared memory: beacons, and the ranks' staging slots.
        idle_log: what a process prints before it has a seat is appended here.

    Attributes:
        on_heard: called with every message of a process.
        on_ended: called when a process has ended, with its exit code, before it is closed.
    """

    def __init__(self, nursery: Nursery, *, memory: Path, idle_log: Path) -> None:
        self.on_heard: Callable[[LiveRank, FromRank], None] = lambda _, __: None
        self.on_ended: Callable[[LiveRank, int], None] = lambda _, __: None
        self._nursery = nursery
        self._memory, self._idle_log = memory, idle_log
        self._all: dict[int, LiveRank] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._forking: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        self._takers = 0
        self._ahead: JobAhead | None = None
        self._closing = False
        (memory / "beacons").mkdir(mode=0o700, exist_ok=True)

    # Who is there -----------------------------------------------------------------------------

    def seated(self) -> dict[Rank, LiveRank]:
        """Return the processes that hold a seat, by rank, ascending."""
        holders = [live for live in self._all.values() if live.seat is not None]
        holders.sort(key=lambda live: live.seat.rank if live.seat else 0)
        return {live.seat.rank: live for live in holders if live.seat is not None}

    def parked(self) -> list[LiveRank]:
        """Return those that wait for a seat, the readiest first."""
        waiting = [live for live in self._all.values() if live.seat is None and not live.dismissed]
        return sorted(waiting, key=_unreadiness)

    def pids(self) -> list[int]:
        """Return the process ids of all of them."""
        return sorted(self._all)

    # Seats --------------------------------------------------------------------------------------

    async def clear(
        self, before: Generation, dismiss: AbstractSet[Rank], limits: Timeouts
    ) -> list[LiveRank]:
        """Have every generation older than `before` end here; return what can not be ended.

        Args:
            before: the generation that begins.
            dismiss: ranks whose process must not live on.
            limits: `abort_s` to leave, then `kill_s` to die.
        """
        old = [
            live
            for live in self._all.values()
            if live.seat is not None and live.seat.generation < before
        ]
        for live in old:
            assert live.seat is not None
            if live.seat.rank in dismiss:
                live.kill()
            elif not live.left:
                live.leave(before)
        stuck = await asyncio.gather(*(self._see_out(live, limits) for live in old))
        if self._ending:
            await asyncio.wait(self._ending, timeout=limits.kill_s)
        return [live for live in stuck if live is not None]

    async def take(self) -> LiveRank:
        """Return a process without a seat: a parked one, or one forked now.

        Raises:
            WarmUpError: if none can be forked.
            OSError: if this node has no memory, descriptor or file for one.
        """
        self._takers += 1
        try:
            while not (parked := self.parked()):
                if len(self._forking) < self._takers:
                    self._fork({})
                done, _ = await asyncio.wait(self._forking, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            return parked[0]
        finally:
            self._takers -= 1

    def park_rest(self, seats: Iterable[Rank], before: Generation) -> None:
        """Park those who left an older generation and whose rank is none of `seats`."""
        kept = set(seats)
        for rank, live in self.seated().items():
            if live.seat is not None and live.seat.generation < before and rank not in kept:
                live.park()

    async def refill(self, wanted: int) -> None:
        """See that `wanted` processes are parked: fork what is missing, end what is too much.

        Nothing happens once they are being ended.

        Raises:
            NurseryClosedError: if that begins meanwhile.
            WarmUpError: if none can be forked.
            OSError: if this node has no memory, descriptor or file for one.
        """
        if self._closing:
            return
        parked = self.parked()
        for live in parked[wanted:]:
            live.kill()
        for _ in range(wanted - len(parked) - len(self._forking)):
            self._fork({STAND_BY_VARIABLE: "1"})
        if self._forking:
            done, _ = await asyncio.wait(self._forking)
            for task in done:
                task.result()

    def foresee(self, ahead: JobAhead) -> None:
        """Tell those without a seat, now and later, what one would be of."""
        if ahead != self._ahead:
            self._ahead = ahead
            for live in self.parked():
                live.control.send(ahead)

    # The end ------------------------------------------------------------------------------------

    async def end_all(self, limits: Timeouts) -> list[LiveRank]:
        """End every process: Retire, SIGTERM, SIGKILL; return what survived that.

        The nursery is to be closed before, or one could be born behind our back.
        """
        self._closing = True
        for live in self._all.values():
            live.dismissed = True
            live.control.send(Retire())
        if self._forking:
            await asyncio.wait(self._forking, timeout=limits.kill_s)
        for number, within_s in (
            (signal.SIGTERM, limits.terminate_s / 2),
            (signal.SIGKILL, limits.terminate_s / 2),
            (None, limits.kill_s),
        ):
            await self._until_gone(within_s)
            for live in self._all.values():
                if number is not None:
                    live.signal(number)
        return list(self._all.values())

    def kill_all(self) -> None:
        """SIGKILL to all of them."""
        self._closing = True
        for live in self._all.values():
            live.kill()

    def reap_strays(self) -> None:
        """Reap the dead that nobody waits for: orphans of ranks, and forks that were given up.

        The living are let be; they may work for a rank that is well.
        """
        if self._forking or self._ending:
            return  # their dead are about to be claimed
        for pid in linux.children():
            vitals = linux.vitals(pid)
            stray = pid not in self._all and pid != self._nursery.pid
            if stray and vitals is not None and vitals.state == "Z":
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    async def _until_gone(self, within_s: float) -> None:
        waits = [asyncio.create_task(_until(live.gone)) for live in self._all.values()]
        if waits or self._ending:
            await asyncio.wait({*waits, *self._ending}, timeout=within_s)
        for wait in waits:
            wait.cancel()

    async def _see_out(self, live: LiveRank, limits: Timeouts) -> LiveRank | None:
        """Wait until it has left; kill it if it does not. Return it if it survives that."""
        if not live.dismissed:
            if await _within(live.out, limits.abort_s):
                return None
            rank = live.seat.rank if live.seat else -1
            log.warning("rank %d did not leave in %.1f s; killed", rank, limits.abort_s)
            live.kill()
        return None if await _within(live.gone, limits.kill_s) else live

    # Birth and death ----------------------------------------------------------------------------

    def _fork(self, purpose: dict[str, str]) -> None:
        """Start forking one more. A task of its own: whoever waits for it may be cancelled."""
        task = asyncio.create_task(self._park_one(purpose))
        self._forking.add(task)
        task.add_done_callback(self._forking.discard)
        task.add_done_callback(_retrieve)

    async def _park_one(self, purpose: dict[str, str]) -> None:
        page = self._memory / "beacons" / f"{os.getpid()}-{next(self._numbers)}"
        environment = {BEACON_VARIABLE: str(page), MEMORY_VARIABLE: str(self._memory)} | purpose
        with contextlib.ExitStack() as undo:
            create(page)
            undo.callback(page.unlink)
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            with theirs:
                pid = await self._nursery.fork(
                    environment, theirs, CONTROL_FD_VARIABLE, self._idle_log
                )
            undo.callback(_end_unknown, pid)
            live = LiveRank(RankProcess(pid), page)
            undo.pop_all()

        def heard(message: FromRank) -> None:
            live.hear(message)
            self.on_heard(live, message)

        live.control = Control(ours, heard, lambda reason: self.break_off(live, reason))
        self._all[pid] = live
        asyncio.get_running_loop().add_reader(live.process.descriptor, self._ended, live)
        if self._ahead is not None:
            live.control.send(self._ahead)
        if self._closing:
            live.kill()

    def break_off(self, live: LiveRank, reason: str) -> None:
        """Kill a process that does not keep to the protocol; its end is news."""
        log.error("process %d: %s; killed", live.pid, reason)
        live.last_words = Died(
            generation=live.seat.generation if live.seat else Generation(0),
            kind="ProtocolError",
            message=reason,
            traceback="",
        )
        live.signal(signal.SIGKILL)

    def _ended(self, live: LiveRank) -> None:
        asyncio.get_running_loop().remove_reader(live.process.descriptor)
        live.control.drain()
        code = live.process.reap()
        assert code is not None, "a process descriptor is readable only once its process has ended"
        del self._all[live.pid]
        try:
            self.on_ended(live, code)
        finally:
            live.left = True
            live.out.set()
            live.close()
            task = asyncio.create_task(self._bury(live))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _bury(self, live: LiveRank) -> None:
        if not live.process.reap_group(0.0):
            await asyncio.to_thread(live.process.reap_group, GROUP_WITHIN_S)
        live.gone.set()


def _end_unknown(pid: int) -> None:
    """End a child that can not be kept; it is reaped with the strays."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _unreadiness(live: LiveRank) -> tuple[int, int]:
    reading = live.read()
    ready = reading is not None and reading.phase is RankPhase.WAITING
    return (0 if ready else 1, live.pid)


async def _until(event: asyncio.Event) -> None:
    await event.wait()


async def _within(event: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def _retrieve(task: asyncio.Task[None]) -> None:
    """Look at a task's exception, so that one whose waiter is gone is not reported as unseen."""
    if not task.cancelled():
        task.exception()
