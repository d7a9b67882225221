"""Words the orders that have a node take part in the present generation, or keep it out."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.decisions import StartGeneration
from orchestrator.core.journal import Entry
from orchestrator.core.lineage import continued
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import Ancestor, Begin, Fence
from orchestrator.protocol.runfile import TrainingRun
from storage.manifest import parse_commit_key


class Orders:
    """The orders of one run.

    Attributes:
        started: what started the present generation; None before the first.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.started: StartGeneration | None = None
        self._shards = run.world_size // run.spec.parallelism.dp_replicate
        self._restore: Step | None = None
        self._ancestors: tuple[Ancestor, ...] = ()
        self._ranks: dict[NodeId, tuple[Rank, ...]] = {}

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
            if isinstance(decision, StartGeneration):
                self.started = decision
        if self.started is not None:
            self._ranks = _ranks(self.started)

    def start(self, decision: StartGeneration) -> None:
        """Enter a new generation, and note which one it continues."""
        restore = decision.restore
        before = self.started.generation if self.started else Generation(0)
        self.started, self._ranks = decision, _ranks(decision)
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
        started = self._started()
        ranks = tuple(Rank(rank) for rank in range(len(started.seats)))
        return self._begin(order, ranks, started.dismiss, started.buddies, peers)

    def begin_on(self, node: NodeId, order: str, peers: dict[NodeId, str]) -> Begin:
        """Return the part of that which is about the ranks of one node.

        Args:
            node: has a seat.
            order: names the order.
            peers: addresses for it.
        """
        started, ranks = self._started(), self._ranks[node]
        dismiss = tuple(rank for rank in started.dismiss if rank in ranks)
        buddies = {n: buddy for n, buddy in ((node, started.buddies.get(node)),) if buddy}
        return self._begin(order, ranks, dismiss, buddies, peers)

    def _started(self) -> StartGeneration:
        assert self.started is not None, "no generation has been started"
        return self.started

    def _begin(
        self,
        order: str,
        ranks: tuple[Rank, ...],
        dismiss: tuple[Rank, ...],
        buddies: dict[NodeId, NodeId],
        peers: dict[NodeId, str],
    ) -> Begin:
        started = self._started()
        restore = started.restore
        return Begin(
            order=order,
            generation=started.generation,
            world_size=len(started.seats),
            ranks=ranks,
            seats=tuple(started.seats[rank] for rank in ranks),
            dismiss=dismiss,
            buddies=buddies,
            peers=peers,
            restore=self._restore,
            ancestors=self._ancestors,
            sources=tuple(restore.sources[rank] for rank in ranks) if restore else (),
            commit=restore.commit if restore else "",
            shard_of=tuple(rank % self._shards for rank in ranks),
            # Replicas hold the same shards, and the first one has the lowest ranks.
            writers=tuple(rank for rank in ranks if rank < self._shards),
        )

    def fence(self, order: str, generation: Generation) -> Fence:
        """Return what keeps a node without a seat out of a generation."""
        return Fence(
            order=order, generation=generation, restore=self._restore, ancestors=self._ancestors
        )


def _ranks(decision: StartGeneration) -> dict[NodeId, tuple[Rank, ...]]:
    """Return the ranks that have their seat on each node."""
    ranks: dict[NodeId, list[Rank]] = {}
    for rank, node in enumerate(decision.seats):
        ranks.setdefault(node, []).append(Rank(rank))
    return {node: tuple(own) for node, own in ranks.items()}
