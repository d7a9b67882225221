"""What makes steps slower for a while: nodes, the network of the whole job, the time of day."""

from __future__ import annotations

from math import isfinite, pi, sin

from orchestrator.policy.arithmetic import DAY_S
from orchestrator.protocol.ids import NodeId
from orchestrator.worlds.simulated.world import SimulatedWorld

HOUR_S = 3_600.0


class Speeds:
    """Slows a world down. What slows the same thing at the same time multiplies.

    Args:
        world: whose steps take longer.
        amplitude: by which share speed falls and rises once a day; 0 for not at all.
    """

    def __init__(self, world: SimulatedWorld, amplitude: float) -> None:
        self._world, self._amplitude = world, amplitude
        self._of_node: dict[NodeId, dict[int, float]] = {}
        self._of_job: dict[int, float] = {}
        self._number = 0
        if amplitude:
            self._turn()

    def slow(self, share: float, lasts_s: float, node: NodeId | None = None) -> None:
        """Have steps be slower by a share of their speed; by a node while it is in the job.

        Args:
            share: in [0, 1).
            lasts_s: seconds; infinite until `heal`.
            node: whose fault it is; None for nobody's.
        """
        self._number += 1
        number = self._number
        where = self._of_job if node is None else self._of_node.setdefault(node, {})
        where[number] = 1 / (1 - share)
        self._apply()
        if isfinite(lasts_s):
            self._world.cluster.agenda.after(lasts_s, lambda: self._end(number, node))

    def heal(self, node: NodeId) -> None:
        """Have a node be as fast as it should be."""
        if self._of_node.pop(node, None) is not None:
            self._apply()

    def _end(self, number: int, node: NodeId | None) -> None:
        where = self._of_job if node is None else self._of_node.get(node, {})
        if where.pop(number, None) is not None:
            self._apply()

    def _turn(self) -> None:
        self._apply()
        self._world.cluster.agenda.after(HOUR_S, self._turn)

    def _apply(self) -> None:
        job = 1.0
        for times in self._of_job.values():
            job *= times
        day = 1 - self._amplitude * sin(2 * pi * self._world.now / DAY_S)
        job /= day
        nodes = self._world.cluster.nodes
        for node in nodes.values():
            node.slow = job
        for name, slowed in self._of_node.items():
            for times in slowed.values():
                nodes[name].slow *= times
        self._world.change_speed()
