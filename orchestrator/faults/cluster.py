"""How many entities of each kind a cluster has, and which nodes each of them takes along.

Places are counted from 0 along the topology: GPU g sits in node g // gpus_per_node, and so on up.
The last rack, power domain and pod may be partly filled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from orchestrator.faults.quantities import Entity

Places = npt.NDArray[np.int64]
Blast = Literal["none", "gpu", "node", "rack", "power-domain", "pod", "job"]
GPUS_MAX = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Sizes of a cluster; the defaults are those of Llama 3, arXiv 2407.21783, section 3.3.1."""

    gpus: int
    gpus_per_node: int = 8
    nodes_per_rack: int = 2
    racks_per_pod: int = 192
    racks_per_power_domain: int = 8

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not 1 <= getattr(self, name) <= GPUS_MAX:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 to {GPUS_MAX}")
        if self.gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus is {self.gpus}, expected a multiple of {self.gpus_per_node} per node"
            )

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.gpus // self.gpus_per_node

    def nodes_per(self, what: Entity | Blast) -> int:
        """Return how many nodes hang on one rack, power domain or pod; 1 for anything else."""
        racks = {"rack": 1, "power-domain": self.racks_per_power_domain, "pod": self.racks_per_pod}
        return self.nodes_per_rack * racks[what] if what in racks else 1

    def count(self, entity: Entity) -> int:
        """Return how many there are. Every GPU has one NIC and one link to its switch."""
        match entity:
            case "job":
                return 1
            case "gpu" | "nic" | "link":
                return self.gpus
            case _:
                return -(-self.nodes // self.nodes_per(entity))

    def node_of(self, entity: Entity, places: Places) -> Places:
        """Return the first node of each entity."""
        if entity in ("gpu", "nic", "link"):
            return places // self.gpus_per_node
        return places * self.nodes_per(entity)

    def reach(self, blast: Blast, nodes: Places) -> tuple[Places, Places]:
        """Return the first node and the number of nodes that a fault in each node breaks.

        A blast of `job` or `none` breaks no more than the node that it comes from.
        """
        width = self.nodes_per(blast)
        first = nodes - nodes % width
        return first, np.minimum(first + width, self.nodes) - first
