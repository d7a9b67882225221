"""Words the orders that have a node take part in the present generation, or keep it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar, cast

from orchestrator.core.decisions import StartGeneration
from orchestrator.core.journal import Entry
from orchestrator.core.lineage import continued
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import Ancestor, Begin, Fence
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.seats import ranks_by_node
from storage.manifest import parse_commit_key

T = TypeVar("T")


class _Parts(NamedTuple):
    """What some ranks have to do with the durable tier."""

    ranks: tuple[Rank, ...]
    shard_of: tuple[int, ...]
    writers: tuple[Rank, ...]


class Orders:
    """The orders of one run.

    Attributes:
        started: what started the present generation; None before the first.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.started: StartGeneration | None = None
        self._layout = run.layout
        everybody = cast("tuple[Rank, ...]", tuple(range(run.world_size)))
        self._of_all = self._parts(everybody)
        self._restore: Step | None = None
        self._ancestors: tuple[Ancestor, ...] = ()
        self._ranks: dict[NodeId, tuple[Rank, ...]] = {}
        self._former: dict[NodeId, tuple[Rank, ...]] = {}
        """Ranks of each node of the generation before."""

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """The nodes with a seat in the present generation, in rank order."""
        return tuple(self._ranks)

    def resume(self, state: RunState, entries: Sequence[Entry]) -> None:
        """Continue from what a journal says, and from the state that replaying it led to."""
        self._ancestors = state.ancestors
        # Whoever continues from the seed has none.
        self._restore = state.start_step if state.ancestors else None
        for decision in (d for entry in entries for d in entry.decisions):
            if isinstance(decision, StartGeneration) and decision != self.started:
                self._seat(decision)

    def _seat(self, decision: StartGeneration) -> None:
        self.started, self._former = decision, self._ranks
        self._ranks = ranks_by_node(decision.seats)

    def start(self, decision: StartGeneration) -> None:
        """Enter a new generation, and note which one it continues."""
        restore = decision.restore
        before = self.started.generation if self.started else Generation(0)
        self._seat(decision)
        self._restore = restore.step if restore else None
        commit = parse_commit_key(restore.commit) if restore else None
        epoch = Generation(commit[1]) if commit else None
        self._ancestors = continued(self._ancestors, before, self._restore, epoch)

    def begin(self, order: str, peers: dict[NodeId, str]) -> Begin:
        """Return what begins the present generation on all of its nodes.

        Args:
            order: names the order.
            peers: addresses for it.
        """
        started, parts = self._started(), self._of_all
        if len(started.seats) < len(parts.ranks):
            fewer = tuple(rank for ranks in self._ranks.values() for rank in ranks)
            parts = self._parts(fewer)
        return self._begin(order, parts, started.dismiss, started.buddies, peers)

    def begin_on(self, node: NodeId, order: str, peers: dict[NodeId, str]) -> Begin:
        """Return the part of that which is about the ranks of one node.

        Args:
            node: has a seat.
            order: names the order.
            peers: addresses for it.
        """
        started, ranks = self._started(), self._ranks[node]
        # Whose process is to go is said in the words of the world that it belonged to.
        former = self._former.get(node, ())
        dismiss = tuple(rank for rank in started.dismiss if rank in former)
        buddies = {n: buddy for n, buddy in ((node, started.buddies.get(node)),) if buddy}
        return self._begin(order, self._parts(ranks), dismiss, buddies, peers)

    def _parts(self, ranks: tuple[Rank, ...]) -> _Parts:
        return _Parts(
            ranks=ranks,
            shard_of=tuple(self._layout.shard_of(rank) for rank in ranks),
            # Replicas hold the same shards.
            writers=tuple(rank for rank in ranks if self._layout.replica_of(rank) == 0),
        )

    def _started(self) -> StartGeneration:
        assert self.started is not None, "no generation has been started"
        return self.started

    def _begin(
        self,
        order: str,
        parts: _Parts,
        dismiss: tuple[Rank, ...],
        buddies: dict[NodeId, NodeId],
        peers: dict[NodeId, str],
    ) -> Begin:
        started = self._started()
        restore, ranks = started.restore, parts.ranks
        return Begin(
            order=order,
            generation=started.generation,
            world_size=len(started.seats),
            ranks=ranks,
            seats=_taken(started.seats, ranks),
            dismiss=dismiss,
            buddies=buddies,
            peers=peers,
            restore=self._restore,
            ancestors=self._ancestors,
            sources=_taken(restore.sources, ranks) if restore else (),
            staged_as=_taken(restore.staged_as, ranks) if restore and restore.staged_as else (),
            commit=restore.commit if restore else "",
            shard_of=parts.shard_of,
            cut_anew=restore is not None and restore.cut_anew != "",
            cadence=started.cadence,
            watched=bool(started.watched),
            writers=parts.writers,
        )

    def fence(self, order: str, generation: Generation) -> Fence:
        """Return what keeps a node without a seat out of a generation."""
        return Fence(
            order=order, generation=generation, restore=self._restore, ancestors=self._ancestors
        )


def _taken(of_all: tuple[T, ...], ranks: tuple[Rank, ...]) -> tuple[T, ...]:
    """Return what belongs to some ranks, or to all of them, as it is."""
    if len(ranks) == len(of_all):
        return of_all
    return tuple(of_all[rank] for rank in ranks)
