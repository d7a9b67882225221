"""Words the orders that have a node take part in the present generation, or keep it out."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.decisions import StartGeneration
from orchestrator.core.journal import Entry
from orchestrator.core.lineage import continued
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Generation, NodeId, Step
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

    def resume(self, state: RunState, entries: Sequence[Entry]) -> None:
        """Continue from what a journal says, and from the state that replaying it led to."""
        self._ancestors = state.ancestors
        # Whoever continues from the seed has none.
        self._restore = state.start_step if state.ancestors else None
        for decision in (d for entry in entries for d in entry.decisions):
            if isinstance(decision, StartGeneration):
                self.started = decision

    def start(self, decision: StartGeneration) -> None:
        """Enter a new generation, and note which one it continues."""
        restore = decision.restore
        before = self.started.generation if self.started else Generation(0)
        self.started = decision
        self._restore = restore.step if restore else None
        commit = parse_commit_key(restore.commit) if restore else None
        epoch = Generation(commit[1]) if commit else None
        self._ancestors = continued(self._ancestors, before, self._restore, epoch)

    def begin(self, order: str, peers: dict[NodeId, str]) -> Begin:
        """Return what has a seated node begin the present generation.

        Args:
            order: names the order.
            peers: addresses for it.
        """
        started = self.started
        assert started is not None, "no generation has been started"
        restore = started.restore
        return Begin(
            order=order,
            generation=started.generation,
            seats=started.seats,
            dismiss=started.dismiss,
            buddies=started.buddies,
            peers=peers,
            restore=self._restore,
            ancestors=self._ancestors,
            sources=restore.sources if restore else (),
            commit=restore.commit if restore else "",
            shard_of=tuple(rank % self._shards for rank in range(len(started.seats))),
        )

    def fence(self, order: str, generation: Generation) -> Fence:
        """Return what keeps a node without a seat out of a generation."""
        return Fence(
            order=order, generation=generation, restore=self._restore, ancestors=self._ancestors
        )
