"""Which entity a fault strikes: lemons much more often than other nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestrator.faults.cluster import Cluster, Places
from orchestrator.faults.model import FaultClass, Lemons

PER_NODE = ("gpu", "nic", "link")
WIDE = ("rack", "power-domain", "pod")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Strike:
    """Draws places on one cluster."""

    cluster: Cluster
    lemons: Places
    others: Places
    weight: float
    """The probability that a fault of a node strikes a lemon."""

    def places(self, fault: FaultClass, rng: np.random.Generator, size: int) -> Places:
        """Draw so many entities of a class, with repetition."""
        if fault.blast in WIDE or fault.entity not in (*PER_NODE, "node"):
            return rng.integers(0, self.cluster.count(fault.entity), size)
        nodes = self._nodes(rng, size)
        if fault.entity == "node":
            return nodes
        per_node = self.cluster.gpus_per_node
        return nodes * per_node + rng.integers(0, per_node, size)

    def _nodes(self, rng: np.random.Generator, size: int) -> Places:
        if not len(self.lemons) or not len(self.others):
            return rng.integers(0, self.cluster.nodes, size)
        bad = rng.random(size) < self.weight
        among_bad = self.lemons[rng.integers(0, len(self.lemons), size)]
        return np.where(bad, among_bad, self.others[rng.integers(0, len(self.others), size)])


def strike(lemons: Lemons | None, cluster: Cluster, rng: np.random.Generator) -> Strike:
    """Draw which nodes are lemons.

    Only where faults strike depends on lemons, not how many there are: totals stay.
    """
    share, hazard = (lemons.share, lemons.hazard) if lemons is not None else (0.0, 1.0)
    # A tenth of a lemon in a small cluster is one in every tenth cluster.
    number = min(int(share * cluster.nodes + rng.random()), cluster.nodes)
    chosen = np.sort(rng.choice(cluster.nodes, number, replace=False))
    is_lemon = np.zeros(cluster.nodes, dtype=np.bool_)
    is_lemon[chosen] = True
    pull = hazard * number
    return Strike(
        cluster=cluster,
        lemons=np.flatnonzero(is_lemon),
        others=np.flatnonzero(~is_lemon),
        weight=pull / (pull + cluster.nodes - number),
    )
