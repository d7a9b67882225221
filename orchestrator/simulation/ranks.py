"""Has ranks of a simulated run die, hang, or wait for each other, whoever of them it befalls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestrator.protocol.ids import NodeId, Rank
from orchestrator.simulation.machines import Machines
from orchestrator.worlds.simulated.flaws import Death
from orchestrator.worlds.simulated.node import SimNode
from orchestrator.worlds.simulated.world import SimulatedWorld


class Ranks:
    """Those of one run.

    Args:
        world: which has them.
        machines: that they are on.
        chance: draws which of them it is.
    """

    def __init__(
        self, world: SimulatedWorld, machines: Machines, chance: np.random.Generator
    ) -> None:
        self._world, self._machines, self._chance = world, machines, chance
        self._bugs = 0

    def _rank_of(self, node: SimNode) -> Rank | None:
        """Return a rank that has its seat on a node, drawn; None if it has none."""
        team = self._world.team
        ranks = team.ranks_of(node.id) if team is not None else ()
        return ranks[int(self._chance.integers(len(ranks)))] if ranks else None

    def end_any(self, death: Death) -> None:
        """Have a rank die, wherever."""
        node = self._machines.anybody()
        if node is not None:
            self.end(node, death)

    def end(self, node: SimNode, death: Death) -> None:
        """Have a rank of a node die, if it has one."""
        rank = self._rank_of(node)
        if rank is not None and self._world.team is not None:
            self._world.team.end(rank, death)

    def fail(self) -> tuple[NodeId, ...]:
        """Have a rank raise an exception, each time another, for it is another bug; say where."""
        node = self._machines.anybody()
        if node is None:
            return ()
        self._bugs += 1
        self.end(node, Death(1, f"Bug{self._bugs}Error", "nobody had thought of that"))
        return (node.id,)

    def freeze(self, node: SimNode) -> None:
        """Have a rank wait for what never comes, as the kernel shows it: it sleeps."""
        rank = self._rank_of(node)
        if rank is not None and self._world.team is not None:
            self._world.team.freeze(rank, "S")

    def hang(self) -> None:
        """Have every rank wait for what never comes."""
        team = self._world.team
        if team is not None:
            for rank in range(len(team.seats)):
                team.freeze(Rank(rank), "S")

    def jam(self, nodes: Sequence[SimNode]) -> None:
        """Have the collectives of all fail since those of one of these nodes do."""
        team = self._world.team
        if team is None or not nodes:
            return
        node = nodes[int(self._chance.integers(len(nodes)))]
        self.freeze(node)
        team.trouble("a collective timed out")
