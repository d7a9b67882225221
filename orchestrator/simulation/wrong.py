"""Has nodes of a simulated run compute wrong numbers until somebody knows, and tests them then."""

from __future__ import annotations

from orchestrator.faults.model import FaultClass
from orchestrator.faults.quantities import span_s
from orchestrator.protocol.ids import NodeId
from orchestrator.simulation.machines import LEAVES_S, Absence, Machines
from orchestrator.simulation.struck import Struck
from orchestrator.worlds.simulated.corruption import Habit
from orchestrator.worlds.simulated.node import SimNode
from orchestrator.worlds.simulated.profile import Habits
from orchestrator.worlds.simulated.world import SimulatedWorld

SDC_FOUND_S = 14_400.0
"""Until wrong numbers that do not show by themselves are noticed, where a model does not say."""


class WrongNumbers:
    """Those of one run.

    Args:
        world: whose state gets wrong.
        machines: where who did it is tested.
        habits: as for `Effects`.
    """

    def __init__(self, world: SimulatedWorld, machines: Machines, habits: Habits | None) -> None:
        self._world, self._machines, self._habits = world, machines, habits
        self._nodes: dict[NodeId, tuple[Struck, Absence]] = {}
        """Who computes them, until it is tested."""
        self._suspected: set[NodeId] = set()
        self._seats: frozenset[NodeId] = frozenset()
        world.corruption.found = self._found

    def begin(
        self, node: SimNode, each: FaultClass, struck: Struck, absence: Absence, *, shows: bool
    ) -> None:
        """Have a node compute wrong numbers, until somebody knows and takes it away.

        Who knows says after which step it began, and suspects the node; it is proven once it is
        localised. Other systems wait for that; what ours does is up to its policies.
        """
        habits = self._habits
        known_s = wrong_for_s(each, habits, shows=shows)
        proof_s = 0.0 if habits is None else habits.localise_s(each)
        habit = Habit(known_s, proven=False)
        if habits is not None and habits.notice.value != "own":
            habit = Habit(known_s)
        elif proof_s > 0:
            habit = Habit(known_s - proof_s, proven=False, proof_s=proof_s)
        self._nodes[node.id] = (struck, absence)
        self._world.corruption.corrupt(node.id, habit)

    def seated(self, seats: frozenset[NodeId]) -> None:
        """Take in who has a seat from now on: what was quarantined is tested."""
        for name in sorted(self._suspected - seats):
            self._test(name)
        self._seats = seats

    def _found(self, name: NodeId) -> None:
        struck, _ = self._nodes[name]
        if struck.found_at is None:
            struck.found_at = self._world.now
        self._suspected.add(name)
        if name not in self._seats:
            self._test(name)

    def _test(self, name: NodeId) -> None:
        """Have a node be tested that was suspected, now that it has no seat."""
        self._suspected.remove(name)
        _, absence = self._nodes.pop(name)
        self._machines.test(self._world.cluster.nodes[name], absence, LEAVES_S)


def wrong_for_s(fault: FaultClass, habits: Habits | None, *, shows: bool) -> float:
    """Return how long a node computes wrong numbers before anybody names it, seconds.

    Args:
        fault: a class with that effect.
        habits: of the profile.
        shows: whether it shows by itself, so that it has only to be localised.
    """
    detect_s = SDC_FOUND_S
    if fault.detect is not None:
        detect_s = span_s(fault.detect.legacy or fault.detect.good)
    if habits is None:
        return 0.0 if shows else detect_s
    found_s = habits.detect_s(fault)
    localise_s = habits.localise_s(fault)
    return localise_s + (0.0 if shows else detect_s if found_s is None else found_s)
