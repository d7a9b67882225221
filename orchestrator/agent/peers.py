"""Serves a node's shards to other agents, and takes copies of theirs, on the agent's loop.

A connection carries one transfer after another. Whoever calls shows that it knows the run's token
before anything else is read. A copy comes with the lineage that its sender knows of, so that an
older one is refused, and a node that takes copies without being part of the world keeps up.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from concurrent.futures import Executor
from enum import Enum
from functools import partial
from pathlib import Path

from orchestrator.agent.checking import Checking
from orchestrator.agent.files import remove
from orchestrator.agent.frames import Ask, Done, Message, Offer, Pick, Piece, cut_off, failed
from orchestrator.agent.greeting import WITHIN_S, admit
from orchestrator.agent.mending import SentAgain
from orchestrator.agent.shards import (
    CorruptError,
    KeeperError,
    MalformedError,
    Shard,
    Shelf,
    StaleError,
    UnreachableError,
)
from orchestrator.agent.transfer import give, read_piece, take
from orchestrator.agent.wire import EndedError, Wire
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step

log = logging.getLogger(__name__)

CALLERS_MAX = 64
"""Connections at a time: many, for the few nodes that copy to this one or fetch from it."""
IDLE_S = 600.0
"""A connection on which nothing was said for so long is closed by the server."""
_ACCEPT_PAUSE_S = 0.1
_CLOSE_S = 1.0


class _State(Enum):
    """What a caller is doing; when there are too many, those of the first two go, in this order."""

    UNKNOWN = "has not shown the token"
    IDLE = "wants nothing at the moment"
    BUSY = "gives or takes a shard"


class PeerServer:
    """Serves this node's shelf to other agents.

    Attributes:
        transfer_s: a peer that has sent or taken nothing of a shard for so long is dropped.
            However long all of it takes: only its sender knows the rate, and bounds that.
        unreachable: whether everybody is refused.
    """

    def __init__(
        self,
        shelf: Shelf,
        *,
        token: str,
        new_file: Callable[[Rank, Step], Path],
        threads: Executor,
        on_copy: Callable[[Generation, Shard], None],
        checking: Checking,
        transfer_s: float,
    ) -> None:
        """Serve nobody yet.

        Args:
            shelf: what is served, and where copies go.
            token: everybody must know it.
            new_file: names a file for a copy.
            threads: where room is made for copies, and where they are verified.
            on_copy: called with the sender's generation for each copy that is held.
            checking: looks at a shard that came out damaged elsewhere, and mends what came damaged
                here.
            transfer_s: see the class.
        """
        self.transfer_s = transfer_s
        self.unreachable = False
        self._shelf = shelf
        self._new_file = new_file
        self._token = token
        self._address = ""
        self._threads = threads
        self._on_copy = on_copy
        self._checking = checking
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._callers: dict[Wire, _State] = {}
        """In the order in which they came into their states."""
        self._serving: set[asyncio.Task[None]] = set()

    def open(self, host: str) -> str:
        """Serve on a free port of `host`; return "host:port".

        Raises:
            OSError: if the host is not an address of this machine.
        """
        family = socket.getaddrinfo(host, 0)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.bind((host, 0))
            listener.listen()
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener))
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        self._address = f"{shown}:{listener.getsockname()[1]}"
        return self._address

    def break_off(self) -> None:
        """End what is under way; whoever is called or calls later is another matter."""
        self._hang_up(_State.BUSY)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Stop serving; what is under way has a second to finish."""
        if self._listener is None or self._accepting is None:
            return
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listener.close()
        self._hang_up(_State.UNKNOWN, _State.IDLE)
        for patience_s in (_CLOSE_S, timeout_s):
            if self._serving:
                await asyncio.wait(self._serving, timeout=patience_s)
            for task in self._serving:
                task.cancel()

    # Callers ------------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connected, place = await loop.sock_accept(listener)
                wire = Wire(connected, f"{place[0]}:{place[1]}")
            except OSError as error:
                # Out of descriptors, for instance: whoever calls waits, or is gone already.
                log.warning("a peer was not let in: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if len(self._callers) >= CALLERS_MAX and not self._make_way():
                wire.close()
                continue
            self._callers[wire] = _State.UNKNOWN
            task = asyncio.create_task(self._serve(wire))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    def _make_way(self) -> bool:
        """Hang up on whoever has been a stranger, or idle, for longest; False if all are busy."""
        for state in (_State.UNKNOWN, _State.IDLE):
            for wire, found in self._callers.items():
                if found is state:
                    wire.abort()
                    del self._callers[wire]
                    return True
        return False

    def _hang_up(self, *states: _State) -> None:
        for wire, state in self._callers.items():
            if state in states:
                wire.abort()

    def _enter(self, wire: Wire, state: _State) -> None:
        self._callers.pop(wire, None)
        self._callers[wire] = state

    async def _serve(self, wire: Wire) -> None:
        """Answer one caller until it hangs up or something goes wrong; never raises."""
        try:
            async with asyncio.timeout(self._hello_s):
                await admit(wire, self._token, self._address)
            while await self._is_called(wire):
                async with asyncio.timeout(self.transfer_s) as patience:
                    wire.on_moved = partial(self._prolong, patience)
                    await self._answer(wire)
        except KeeperError as error:
            wire.say_last(failed(error))
        except EndedError as error:
            wire.say_last(failed(MalformedError(str(error))))
        except TimeoutError:
            late = (
                f"not done in time: a call has {self._hello_s:g} s, silence {self.transfer_s:g} s"
            )
            wire.say_last(failed(UnreachableError(late)))
        except OSError as error:
            wire.say_last(failed(UnreachableError(str(error))))
        except Exception as error:
            log.exception("peer %s", wire.name)
            wire.say_last(failed(KeeperError(repr(error))))
        finally:
            self._callers.pop(wire, None)
            wire.close()

    def _prolong(self, patience: asyncio.Timeout) -> None:
        until = asyncio.get_running_loop().time() + self.transfer_s
        known = patience.when()
        if known is None or patience.expired():
            return
        # Not for each piece: a timer that is taken back costs as much as a new one.
        if until - known > self.transfer_s / 20:
            patience.reschedule(until)

    @property
    def _hello_s(self) -> float:
        return min(WITHIN_S, self.transfer_s)

    async def _is_called(self, wire: Wire) -> bool:
        self._enter(wire, _State.IDLE)
        async with asyncio.timeout(IDLE_S):
            called = await wire.is_called()
        if called:
            self._enter(wire, _State.BUSY)
        return called

    # What they want -----------------------------------------------------------------------

    async def _answer(self, wire: Wire) -> None:
        async with asyncio.timeout(self._hello_s):
            wanted: Message = await wire.hear(Ask, Pick, Offer)
        if self.unreachable:
            raise cut_off()
        if isinstance(wanted, Ask):
            await self._give(wire, self._shelf.require(wanted.rank, wanted.step, wanted.epoch))
        elif isinstance(wanted, Pick):
            await self._pick(wire, wanted)
        elif isinstance(wanted, Offer):
            await self._hold(wire, wanted)

    async def _give(self, wire: Wire, shard: Shard) -> None:
        try:
            with self._shelf.pinned(shard):
                await give(wire, shard)
        except CorruptError:
            # A caller's word is not enough to drop anything; nor is it to be taken for wrong.
            await self._checking.verified(shard)
            await wire.say(Done())

    async def _pick(self, wire: Wire, wanted: Pick) -> None:
        shard = self._shelf.require(wanted.rank, wanted.step)
        reading = partial(read_piece, shard.path, wanted.start, wanted.size)
        with self._shelf.pinned(shard):
            content = await asyncio.get_running_loop().run_in_executor(self._threads, reading)
        await wire.say(Piece())
        await wire.write(content)

    async def _hold(self, wire: Wire, offer: Offer) -> None:
        lineage = offer.lineage
        if lineage is None:
            raise MalformedError("a copy comes without a lineage")
        known = self._shelf.lineage
        if lineage.generation < known.generation:
            raise StaleError(f"copy is of {lineage}, here it is {known}")
        self._shelf.begin(lineage.generation, lineage.restore, lineage.ancestors)
        self._shelf.retain(lineage.retained)
        path = self._new_file(offer.rank, offer.step)
        shard, damaged = await take(wire, offer, path, self._threads)
        if damaged is not None:
            await self._mend_or_refuse(wire, offer, shard, damaged)
        # Time has passed: this compares with what is known now.
        self._shelf.put(shard)
        self._on_copy(lineage.generation, shard)
        await wire.say(Done())

    async def _mend_or_refuse(
        self, wire: Wire, offer: Offer, shard: Shard, damaged: CorruptError
    ) -> None:
        """Have what came damaged sent once more, chunk by chunk; there is no file if it raises."""
        sender = offer.sender or NodeId(wire.name)
        log.warning("%s came damaged from %s: %s", shard, sender, damaged)
        again = SentAgain(sender, wire)
        try:
            await self._checking.mend(shard, sender=sender, first=[again])
        except BaseException as error:
            remove(shard.path)
            if isinstance(error, KeeperError | OSError):
                raise damaged from error
            raise
        if again.broken:
            # It is whole, from elsewhere, but its sender can not be told so, and offers it anew.
            remove(shard.path)
            raise UnreachableError(f"{sender} did not send once more what it was asked for")
