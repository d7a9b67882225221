"""Takes in what the processes of a node say, and how they end: what of it is news, and for whom."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from orchestrator.agent import pulse
from orchestrator.agent.account import STEPPED, Account
from orchestrator.agent.exits import exited
from orchestrator.agent.keeper import Keeper
from orchestrator.agent.live import LiveRank
from orchestrator.agent.parking import Parking
from orchestrator.agent.ranks import Ranks
from orchestrator.agent.saving import Saving
from orchestrator.agent.shards import MalformedError
from orchestrator.protocol.ids import Generation, Rank
from orchestrator.protocol.messages import (
    DetectorFailed,
    Fact,
    RankProbed,
    RanksTroubled,
    RendezvousOffered,
    StateDiverged,
    StateRepaired,
)
from orchestrator.protocol.rank import (
    Abandoned,
    DetectorOff,
    Died,
    Diverged,
    Finished,
    FromRank,
    Offer,
    Probed,
    Reached,
    Repaired,
    Seat,
    Staged,
    Troubled,
)

log = logging.getLogger(__name__)
ADDRESS_MAX = 256
EVIDENCE_MAX = 2000
TENSORS_MAX = 8
"""Of which it is told by name what became of them."""


class Hearing:
    """One node's.

    Args:
        ranks: its processes.
        keeper: its memory.
        account: what it has to say.
        parking: has others stand by.
        saving: takes shards on from memory.
        say: sends a fact, and keeps it.
        start: runs what may wait.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        keeper: Keeper,
        account: Account,
        parking: Parking,
        saving: Saving,
        say: Callable[[Fact], None],
        start: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._ranks, self._keeper, self._account = ranks, keeper, account
        self._parking, self._saving = parking, saving
        self._say, self._start = say, start

    def heard(  # noqa: C901, PLR0912 - one case per message
        self, live: LiveRank, message: FromRank
    ) -> None:
        """Take in what a process says; only news of the present generation counts."""
        seat = live.seat
        if isinstance(message, Died) or seat is None or live.aborted:
            return
        if not message.generation == seat.generation == self._account.generation:
            return
        match message:
            case Offer(address=address):
                self._offered(seat, address[:ADDRESS_MAX])
            case Reached(mark=mark):
                self._reached(seat.rank, mark)
            case Staged():
                self._staged(live, seat.rank, message)
            case Abandoned(step=step, reason=reason):
                self._saving.abandoned(seat.rank, step, reason)
            case Troubled(message=text):
                self._say(
                    RanksTroubled(
                        generation=seat.generation, ranks=(seat.rank,), message=text[:2000]
                    )
                )
            case Probed(generation=generation, number=number, speed=speed):
                self._say(
                    RankProbed(generation=generation, number=number, rank=seat.rank, speed=speed)
                )
            case Diverged():
                self._say(said_of(message, seat.generation))
            case Repaired():
                self._say(_repaired(message, seat.generation))
            case DetectorOff(detector=detector, reason=reason):
                self._say(
                    DetectorFailed(
                        generation=seat.generation,
                        ranks=(seat.rank,),
                        detector=detector[:ADDRESS_MAX],
                        reason=reason[:EVIDENCE_MAX],
                    )
                )
            case Finished(step=step, lanes=lanes):
                fact = self._account.rank_finished(seat.rank, step, lanes)
                if fact is not None:
                    self._say(fact)

    def _offered(self, seat: Seat, address: str) -> None:
        if seat.rank == 0 and address != self._account.offered:
            self._account.offered = address
            self._say(RendezvousOffered(generation=seat.generation, address=address))

    def _reached(self, rank: Rank, mark: str) -> None:
        fact = self._account.rank_reached(rank, mark)
        if fact is None:
            return
        self._say(fact)
        if fact.mark == STEPPED:
            self._saving.resumed()
            # Not earlier: a process that warms up takes its time from those that recover.
            self._start(self._parking.refill())

    def _staged(self, live: LiveRank, rank: Rank, message: Staged) -> None:
        try:
            self._keeper.staged(rank, message)
        except MalformedError as error:
            self._ranks.break_off(live, f"staged what is no shard: {error}")
            return
        self._saving.save(rank, message)

    def ended(self, live: LiveRank, code: int) -> None:
        """Take in how a process ended; news if a seat of the present generation lost it."""
        seat = live.seat
        if seat is None:
            if not live.dismissed:
                self._start(self._parking.replace(live, code))
            return
        pulse.collect_from(self._account, live)
        if live.ended_as_told(code):
            return
        if live.left and self._account.has_finished(seat.rank):
            log.info("rank %d ended with %d after it was done", seat.rank, code)
            return
        log.warning("rank %d (process %d) ended with %d", seat.rank, live.pid, code)
        self._say(exited(live, code))


def said_of(message: Diverged, generation: Generation) -> StateDiverged:
    """Return what an agent says of what ranks of its generation found together."""
    return StateDiverged(
        generation=generation,
        step=message.step,
        since=message.since,
        ranks=message.ranks,
        evidence=message.evidence[:EVIDENCE_MAX],
        proven=message.proven,
        of_data=message.of_data,
    )


def _repaired(message: Repaired, generation: Generation) -> StateRepaired:
    return StateRepaired(
        generation=generation,
        step=message.step,
        ranks=message.ranks,
        source=message.source,
        tensors=tuple(name[:ADDRESS_MAX] for name in message.tensors[:TENSORS_MAX]),
        count=len(message.tensors),
        seconds=message.seconds,
        problem=message.problem[:EVIDENCE_MAX],
        begun=message.begun,
    )
