"""What detecting, deciding and restarting took, taken from the journal of a live run.

All moments are those at which the controller knew, so every span has the way of one message in it;
faults begin when they are ordered, so what finds them has the way of the order in it as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from orchestrator.core.decisions import SearchCheckpoints, StartGeneration
from orchestrator.core.events import (
    CheckpointFound,
    Event,
    FaultInjected,
    NodeLost,
    Reported,
    Together,
)
from orchestrator.core.journal import Entry
from orchestrator.measuring.samples import Samples
from orchestrator.protocol.ids import NodeId, Seconds
from orchestrator.protocol.messages import (
    MARKS,
    Fact,
    FaultCarriedOut,
    Joined,
    Prepared,
    RankExited,
    RanksTroubled,
    Reached,
    RendezvousOffered,
)

_KILLS = ("kill-agent", "lose-node")
_DEATHS = (*_KILLS, "kill-rank")


class _Restart:
    """One generation that continued from a state: who came how far when.

    Args:
        at: when it was decided.
        order: what started it.
        kept: nodes whose processes lived on.
        rebooted: nodes that started again, and how long that took them until they joined.
    """

    def __init__(
        self,
        at: Seconds,
        order: StartGeneration,
        kept: frozenset[NodeId],
        rebooted: dict[NodeId, float],
    ) -> None:
        self.generation = order.generation
        self._at, self._kept, self._rebooted = at, kept, rebooted
        self._nodes = frozenset(order.seats)
        ranks = len(order.seats)  # fewer than before, if replicas are missing
        self._dismissed = {order.seats[rank] for rank in order.dismiss if rank < ranks}
        self._reached: dict[str, dict[NodeId, Seconds]] = {mark: {} for mark in MARKS}
        self._prepared: dict[NodeId, Seconds] = {}
        self._brought: list[tuple[str, float]] = []
        self._offered_at = at

    def hear(self, at: Seconds, node: NodeId, fact: Reached | Prepared | RendezvousOffered) -> None:
        """Take note of how far a node has come."""
        match fact:
            case Reached(mark=mark):
                self._reached[MARKS[mark]].setdefault(node, at)
            case Prepared(fetched=fetched, durable=durable):
                if node not in self._prepared and fetched + durable:
                    self._brought.append(("read" if durable else "fetch", at - self._at))
                self._prepared.setdefault(node, at)
            case RendezvousOffered():
                self._offered_at = at

    def spans(self) -> Iterator[tuple[str, float]]:
        """Yield what each phase took, of the slowest node; nothing if it did not get through."""
        cleared, seated, formed, restored, stepped = (
            self._reached[mark] for mark in ("cleared", "seated", "formed", "restored", "stepped")
        )
        if any(set(reached) < self._nodes for reached in (cleared, stepped, self._prepared)):
            return
        seats_s = {node: seated[node] - cleared[node] for node in self._nodes}
        kept = self._kept & self._nodes
        if kept:
            yield "stop", max(cleared[node] for node in kept) - self._at
        if same := kept - self._dismissed:
            yield "seat", max(seats_s[node] for node in same)
        new = self._nodes - kept - set(self._rebooted)
        for node in new | (kept & self._dismissed):
            yield "warm", seats_s[node]
        for node in new:
            yield "order", cleared[node] - self._at
        for node in self._nodes & set(self._rebooted):
            yield "reboot", self._rebooted[node] + seats_s[node]
        yield from self._brought
        begun = max(self._offered_at, *seated.values())
        yield "rendezvous", max(formed.values()) - begun
        ready = max(*formed.values(), *self._prepared.values())
        yield "load", max(restored.values()) - ready
        yield "first_step", max(stepped.values()) - max(restored.values())


class _Taking:
    """Goes through a journal once."""

    def __init__(self) -> None:
        self.samples = Samples()
        self._restart: _Restart | None = None
        self._faults: dict[int, FaultInjected] = {}
        self._fault: FaultInjected | None = None
        self._killed: dict[NodeId, Seconds] = {}
        self._rebooted: dict[NodeId, float] = {}
        self._seated: frozenset[NodeId] = frozenset()
        self._asked_at: Seconds | None = None

    def see(self, entry: Entry) -> None:
        """Take in an event and what was decided."""
        self._event(entry.event)
        for decision in entry.decisions:
            if isinstance(decision, SearchCheckpoints):
                self._asked_at = entry.event.at
            elif isinstance(decision, StartGeneration):
                self.close()
                self._begin(entry.event.at, decision)

    def close(self) -> None:
        """Take what the generation that is over, or the last one, took."""
        if self._restart is not None:
            self.samples.add_all(self._restart.spans())
            self._restart = None

    def _begin(self, at: Seconds, order: StartGeneration) -> None:
        kept = self._seated - set(self._killed)
        if order.restore is not None:
            self._restart = _Restart(at, order, kept, dict(self._rebooted))
        self._seated = frozenset(order.seats)
        for node in self._rebooted:
            del self._killed[node]
        self._rebooted.clear()

    def _event(self, event: Event) -> None:
        match event:
            case FaultInjected():
                self._faults[event.index] = self._fault = event
                if event.description.startswith(_KILLS):
                    self._killed[event.node] = event.at
            case NodeLost(node=node) if node in self._killed:
                self.samples.add("gone", event.at - self._killed[node])
            case CheckpointFound() if self._asked_at is not None:
                self.samples.add("search", event.at - self._asked_at)
                self._asked_at = None
            case Reported(at=at, node=node, fact=fact):
                self._report(at, node, fact)
            case Together(at=at, nodes=nodes, fact=fact):
                for node in nodes or sorted(self._seated):
                    self._report(at, node, fact)

    def _report(self, at: Seconds, node: NodeId, fact: Fact) -> None:
        match fact:
            case Reached() | Prepared() | RendezvousOffered():
                if self._restart is not None and fact.generation == self._restart.generation:
                    self._restart.hear(at, node, fact)
            case FaultCarriedOut(index=index) if index in self._faults:
                self.samples.add("order", at - self._faults[index].at)
            case Joined() if node in self._killed and not fact.ranks:
                self._rebooted[node] = at - self._killed[node]
            case RankExited(rank=rank) if self._fault and self._fault.target == f"rank {rank}":
                self.samples.add("exit", at - self._fault.at)
            case RanksTroubled() if self._fault and self._fault.description.startswith(_DEATHS):
                self.samples.add("trouble", at - self._fault.at)
                self._fault = None  # of several ranks the first counts


def take(entries: Iterable[Entry]) -> Samples:
    """Return what restarts took; of the journal of a live run, in order."""
    taking = _Taking()
    for entry in entries:
        taking.see(entry)
    taking.close()
    return taking.samples
