"""How an agent has others hold copies of its shards, and fetches shards from them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar

from orchestrator.agent.files import remove
from orchestrator.agent.frames import UNNAMED, Ask, Done, Offer, Pick, Piece, cut_off, failed
from orchestrator.agent.greeting import greet
from orchestrator.agent.shards import (
    CorruptError,
    KeeperError,
    Lineage,
    MalformedError,
    Shard,
    UnreachableError,
)
from orchestrator.agent.transfer import give, take
from orchestrator.agent.wire import Wire, connect
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step

_IDLE_MAX = 16
"""Connections that are kept for later."""
_PAUSES_S = (0.05, 0.2)
"""Before a call that was not answered is made again; a connection may just have ended."""
T = TypeVar("T")


class PeerClient:
    """Calls the servers of other agents; keeps connections open between calls.

    How long a call may take is for its callers to say: a shard of a large model takes as long as it
    takes.

    Args:
        token: of the run; whoever is called must know it.

    Attributes:
        unreachable: whether nobody is called.
    """

    def __init__(self, token: str) -> None:
        self.unreachable = False
        self._token = token
        self._closed = False
        self._idle: list[Wire] = []
        self._busy: set[Wire] = set()

    def close(self) -> None:
        """Close every connection for good; who is calling is told so."""
        self._closed = True
        self.break_off()

    def break_off(self) -> None:
        """Close every connection; a call that is under way is made again, if it may be."""
        for wire in self._busy:
            wire.abort()
        for wire in self._idle:
            wire.close()
        self._idle.clear()

    async def send(
        self,
        address: str,
        shard: Shard,
        lineage: Lineage,
        *,
        bytes_per_s: float | None = None,
        sender: NodeId = UNNAMED,
    ) -> None:
        """Have another agent hold a copy of a shard, which the caller has pinned.

        What of it comes damaged there is sent once more, chunk by chunk.

        It is sent as fast as it goes, or at a rate; then it is not sent again once the other one
        was ready for it: what is held back for others' sake must not come three times.

        Raises:
            KeeperError: of the class that says why it does not.
        """
        under_way = False

        def ready() -> None:
            nonlocal under_way
            under_way = bytes_per_s is not None

        await self._call(
            address,
            lambda wire: give(wire, shard, lineage, bytes_per_s, ready, sender),
            may_again=lambda: not under_way,
        )

    async def fetch(
        self,
        address: str,
        wanted: tuple[Rank, Step],
        path: Path,
        threads: Executor,
        epoch: Generation | None = None,
    ) -> tuple[Shard, KeeperError | None]:
        """Bring a shard from another agent into a new file; return it, and what is wrong with it.

        It is of any generation that staged it, unless there is a certain `epoch` to be.

        Of what came damaged the file stays, and the error is of the class that says whose fault
        that is: CorruptError if it is no good there, UnreachableError if it is. Who gave it has
        looked at its own by then, and dropped or mended that.

        Raises:
            KeeperError: of the class that says why nothing came; there is no file then.
        """

        async def ask(wire: Wire) -> tuple[Shard, KeeperError | None]:
            await wire.say(Ask(*wanted, epoch))
            offer = await wire.hear(Offer)
            if (offer.rank, offer.step) != wanted:
                raise MalformedError(f"{address} offers {offer}, wanted (rank, step) {wanted}")
            shard, damaged = await take(wire, offer, path, threads)
            if damaged is None:
                wire.say_last(Done())
                return shard, None
            try:
                return shard, await _whose_fault(wire, damaged)
            except BaseException:
                remove(path)
                raise

        return await self._call(address, ask)

    async def pick(self, address: str, wanted: tuple[Rank, Step], start: int, size: int) -> bytes:
        """Return bytes of a shard that another agent holds; whether they are good is not known.

        Raises:
            KeeperError: of the class that says why not.
        """

        async def ask(wire: Wire) -> bytes:
            await wire.say(Pick(*wanted, start, size))
            await wire.hear(Piece)
            return await wire.read(size)

        return await self._call(address, ask)

    async def _call(
        self,
        address: str,
        talk: Callable[[Wire], Awaitable[T]],
        may_again: Callable[[], bool] = lambda: True,
    ) -> T:
        for pause_s in (*_PAUSES_S, None):
            self._require_permission()
            try:
                return await self._attempt(address, talk)
            except (OSError, ValueError) as error:
                if pause_s is None or not may_again():
                    raise UnreachableError(f"{address}: {type(error).__name__} {error}") from error
                await asyncio.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, address: str, talk: Callable[[Wire], Awaitable[T]]) -> T:
        kept = self._kept(address)
        wire = kept or await connect(address)
        self._busy.add(wire)
        try:
            self._require_permission()  # it may have ended while the other one picked up
            if kept is None:
                await greet(wire, self._token)
            answer = await talk(wire)
        except BaseException:
            wire.close()
            raise
        finally:
            self._busy.discard(wire)
        self._keep(wire)
        return answer

    def _kept(self, address: str) -> Wire | None:
        """Take out an idle connection to an address that has not died meanwhile."""
        for wire in [w for w in self._idle if w.name == address]:
            self._idle.remove(wire)
            if wire.is_quiet():
                return wire
            wire.close()
        return None

    def _keep(self, wire: Wire) -> None:
        self._idle.append(wire)
        if len(self._idle) > _IDLE_MAX:
            self._idle.pop(0).close()

    def _require_permission(self) -> None:
        if self.unreachable:
            raise cut_off()
        if self._closed:
            raise UnreachableError("this agent is ending")


async def _whose_fault(wire: Wire, damaged: CorruptError) -> KeeperError:
    """Have who gave a shard that came damaged look at its own; return what to say of it."""
    try:
        await wire.say(failed(damaged))
        await wire.hear(Done)
    except KeeperError as error:
        return error
    except OSError:
        return damaged  # nobody vouches for it
    return UnreachableError(f"intact at {wire.name}, and not here: {damaged}")
