"""One simulated node: an agent, what it keeps in memory, and whether anybody can reach it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from orchestrator.agent.shards import Lineage
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import (
    PROTOCOL_VERSION,
    Fact,
    Holding,
    Joined,
    RankExited,
    RendezvousOffered,
    ShardsWritten,
)

SAVES_MAX = 3
"""Steps of which a node keeps shards: what is safe, what becomes so, and what is being staged."""
_STANDING = (RankExited, ShardsWritten)
"""Facts that are said again on a new connection, and that `Joined` does not contain."""


def stands(fact: Fact) -> bool:
    """Whether a fact has to be said again on a new connection."""
    return isinstance(fact, (RendezvousOffered, *_STANDING))


class Save(NamedTuple):
    """State of one generation after `step` steps."""

    step: Step
    generation: Generation


class Judge:
    """Says what counts for a generation, and remembers what it said: thousands of nodes ask."""

    def __init__(self, lineage: Lineage) -> None:
        self.lineage = lineage
        self._said: dict[Save, bool] = {}
        self._retaining: dict[Step, Judge] = {}

    def has(self, save: Save) -> bool:
        """Whether a save counts."""
        if save not in self._said:
            self._said[save] = self.lineage.has(save)
        return self._said[save]

    def retaining(self, step: Step) -> Judge:
        """Return one for which nothing counts before `step`, either."""
        if step <= self.lineage.retained:
            return self
        if step not in self._retaining:
            mine = self.lineage
            theirs = Lineage(mine.generation, mine.restore, step, mine.ancestors)
            self._retaining[step] = Judge(theirs)
        return self._retaining[step]


_ANYTHING = Judge(Lineage())


class SimNode:
    """What a node's agent knows, and what becomes of it.

    Attributes:
        alive: whether its agent runs.
        reachable: whether the controller and other nodes can talk to it.
        connected: whether the controller has a connection to it.
        connection: how many there have been; what is on its way on one is lost with it.
        shelf: ranks whose shards it holds, by save.
        fresh: whether its processes have never had a seat.
        slow: times longer that a step takes because of it, 1.0 if it is well.
        devices: what it is made of; a reboot changes nothing of that.
    """

    def __init__(self, name: NodeId) -> None:
        self.id = name
        self.alive = self.reachable = True
        self.connected = False
        self.incarnation = 1
        self.connection = 0
        self.slow = 1.0
        self.devices: tuple[Device, ...] = ()
        self._forget()

    def _forget(self) -> None:
        self.generation, self.mark = Generation(0), 0
        self.ranks: tuple[Rank, ...] = ()
        self.lanes: tuple[tuple[int, int], ...] = ()
        self.offered = ""
        self.judge = _ANYTHING
        self.shelf: dict[Save, frozenset[Rank]] = {}
        self.fresh = True
        self._news: list[Fact] = []

    def die(self) -> None:
        """Lose the agent, its processes and its memory."""
        self.alive = self.connected = False
        self._forget()

    def reboot(self) -> None:
        """Start another agent."""
        self.alive = True
        self.incarnation += 1

    @property
    def heard(self) -> bool:
        """Whether what it says reaches the controller."""
        return self.alive and self.reachable and self.connected

    # Orders -------------------------------------------------------------------------------------

    def begin(
        self,
        ranks: tuple[Rank, ...],
        judge: Judge,
    ) -> None:
        """Enter a generation, with ranks or without: what it abandons is dropped.

        Args:
            ranks: those of this node.
            judge: of the generation, for which every step counts.
        """
        back_to = judge.lineage.restore
        retained = min(self.judge.lineage.retained, Step(-1) if back_to is None else back_to)
        self.generation, self.ranks, self.mark = judge.lineage.generation, ranks, 0
        self.offered, self.lanes, self._news = "", (), []
        self.judge = judge.retaining(retained)
        self._drop_outside()

    def retain(self, step: Step, *, drop: bool = True) -> None:
        """Drop what is older than `step`, at once or with what is done to the shelf next."""
        self.judge = self.judge.retaining(step)
        if drop:
            self._drop_outside()

    # Memory -------------------------------------------------------------------------------------

    def put(self, save: Save, ranks: Collection[Rank]) -> bool:
        """Hold these shards, too; return whether they count here."""
        if not self.judge.has(save):
            return False
        held = self.shelf.get(save)
        if held is not None and held.issuperset(ranks):
            return True
        self.shelf[save] = frozenset(ranks) if held is None else held.union(ranks)
        if len(self.shelf) <= SAVES_MAX:
            return True
        for oldest in sorted(self.shelf)[:-SAVES_MAX]:
            if oldest.step != self.judge.lineage.retained:
                del self.shelf[oldest]
        return True

    def find(self, rank: Rank, step: Step) -> Save | None:
        """Return the save from which this node can serve a rank's shard; None if it has none."""
        for save, ranks in self.shelf.items():
            if save.step == step and rank in ranks:
                return save
        return None

    def holdings(self) -> tuple[Holding, ...]:
        """Return all that it holds."""
        return tuple(
            Holding(rank, save.step)
            for save in sorted(self.shelf)
            for rank in sorted(self.shelf[save])
        )

    def _drop_outside(self) -> None:
        has = self.judge.has
        if not all(map(has, self.shelf)):
            self.shelf = {save: ranks for save, ranks in self.shelf.items() if has(save)}

    # What it says -------------------------------------------------------------------------------

    def keep(self, fact: Fact) -> None:
        """Remember what has to be said again on the next connection."""
        if isinstance(fact, RendezvousOffered):
            self.offered = fact.address
        elif isinstance(fact, _STANDING):
            self._news.append(fact)

    def standing(self) -> tuple[Fact, ...]:
        """Return what it says again after `joined`."""
        return tuple(self._news)

    def joined(self) -> Joined:
        """Return the first message of a connection."""
        return Joined(
            node=self.id,
            version=PROTOCOL_VERSION,
            incarnation=self.incarnation,
            pid=self.incarnation,
            peer_address=f"{self.id}:1",
            generation=self.generation,
            mark=self.mark,
            ranks=self.ranks,
            holdings=self.holdings(),
            offered=self.offered,
            lanes=self.lanes,
            devices=self.devices,
        )
