"""Has nodes of a simulated run compute wrong numbers until somebody knows, and tests them then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from orchestrator.faults.corruption import CorruptionKind, CorruptionShare, kind_at
from orchestrator.faults.model import FaultClass
from orchestrator.faults.quantities import span_s
from orchestrator.protocol.ids import NodeId
from orchestrator.simulation import constants
from orchestrator.simulation.machines import Absence, Machines
from orchestrator.simulation.struck import Struck
from orchestrator.worlds.simulated.corruption import Habit
from orchestrator.worlds.simulated.node import SimNode
from orchestrator.worlds.simulated.profile import Habits
from orchestrator.worlds.simulated.watching import HOLDERS_MIN, Seen, Watch
from orchestrator.worlds.simulated.world import SimulatedWorld

SDC_FOUND_S = 14_400.0
"""Until wrong numbers that do not show by themselves are noticed, where a model does not say."""
NOTICED, MISSED = "noticed", "missed"


class WrongNumbers:
    """Those of one run.

    Args:
        world: whose state gets wrong.
        machines: where who did it is tested.
        habits: as for `Effects`.
        shares: of which kind wrong numbers are.
        chance: which kind, and whether it is noticed, come from it.

    Attributes:
        kinds: how many of each kind there were, noticed by detectors or missed.
    """

    def __init__(
        self,
        world: SimulatedWorld,
        machines: Machines,
        habits: Habits | None,
        shares: Sequence[CorruptionShare],
        chance: np.random.Generator,
    ) -> None:
        self._world, self._machines, self._habits = world, machines, habits
        self._shares, self._chance = shares, chance
        self._nodes: dict[NodeId, tuple[Struck, Absence]] = {}
        """Who computes them, until it is tested."""
        self._beside: dict[NodeId, NodeId] = {}
        """Who holds the same as one of these, where nobody can tell which of the two is wrong."""
        self._suspected: set[NodeId] = set()
        self._seats: frozenset[NodeId] = frozenset()
        self.kinds: Counter[str] = Counter()
        world.corruption.found = self._found

    def begin(
        self, node: SimNode, each: FaultClass, struck: Struck, absence: Absence, *, shows: bool
    ) -> None:
        """Have a node compute wrong numbers, until somebody knows and takes it away.

        Who knows says after which step it began, and suspects the node; it is proven once it is
        localised. Other systems wait for that; what ours does is up to its policies.
        """
        kind, seen = self._draw()
        self._nodes[node.id] = (struck, absence)
        if seen is None:
            habit = _late(each, self._habits, shows=shows)
        else:
            named = None if seen.proven else self._holders(node)
            habit = Habit(seen.after_s, seen.every, seen.proven, named)
        self._world.corruption.corrupt(node.id, habit)
        if kind == "oneshot":
            self._world.corruption.heal(node.id)

    def alarm(self, node: SimNode, struck: Struck, watch: Watch) -> None:
        """Have a detector name a healthy node, as proven; nobody knows that it is."""
        if node.id in self._nodes:
            return
        self._nodes[node.id] = (struck, Absence(-1, constants.SUSPECTED_OUT.value))
        every = watch.digest_every if watch.watching.value == "digests" else watch.replay_every
        self._world.corruption.corrupt(node.id, Habit(watch.tell.seconds, round(every.value)))
        self._world.corruption.heal(node.id)

    def _draw(self) -> tuple[CorruptionKind | None, Seen | None]:
        """Draw the kind of a corruption, and how detectors see it; None if they never do."""
        # Always as many, so that what detectors see changes nothing but that.
        where, luck = self._chance.random(2)
        kind = kind_at(self._shares, where)
        watch = None if self._habits is None else self._habits.silent
        if kind is None or watch is None:
            return kind, None
        world = self._world
        replicas = world.layout.dp_replicate
        seen = watch.see(kind, holders=replicas, step_s=world.cluster.profile.step.value)
        noticed = seen is not None and luck < seen.recall
        self.kinds[f"{kind}, {NOTICED if noticed else MISSED}"] += 1
        return kind, seen if noticed else None

    def _holders(self, node: SimNode) -> tuple[NodeId, ...]:
        """Return a node and the one that holds the same, of two replicas."""
        team = self._world.team
        if team is None or node.id not in team.ranks:
            return (node.id,)
        first = team.ranks[node.id][0]
        other = team.seats[(first + len(team.seats) // HOLDERS_MIN) % len(team.seats)]
        self._beside[node.id] = other
        return tuple(dict.fromkeys((node.id, other)))

    def seated(self, seats: frozenset[NodeId]) -> None:
        """Take in who has a seat from now on: what was quarantined is tested."""
        for name in sorted(self._suspected - seats):
            self._test(name)
        self._seats = seats

    def _found(self, name: NodeId) -> None:
        struck, _ = self._nodes[name]
        if struck.found_at is None:
            struck.found_at = self._world.now
        beside = self._beside.pop(name, name)
        if beside not in self._nodes:
            self._nodes[beside] = (struck, Absence(-1, constants.SUSPECTED_OUT.value))
        for suspect in dict.fromkeys((name, beside)):
            self._suspected.add(suspect)
            if suspect not in self._seats:
                self._test(suspect)

    def _test(self, name: NodeId) -> None:
        """Have a node be tested that was suspected, now that it has no seat."""
        self._suspected.remove(name)
        _, absence = self._nodes.pop(name)
        self._machines.test(self._world.cluster.nodes[name], absence, constants.LEAVES.value)


def _late(fault: FaultClass, habits: Habits | None, *, shows: bool) -> Habit:
    """Return how wrong numbers are found that no detector sees."""
    known_s = wrong_for_s(fault, habits, shows=shows)
    proof_s = 0.0 if habits is None else habits.localise_s(fault)
    if habits is not None and habits.notice.value != "own":
        return Habit(known_s)
    if proof_s > 0:
        return Habit(known_s - proof_s, proven=False, proof_s=proof_s)
    return Habit(known_s, proven=False)


def wrong_for_s(fault: FaultClass, habits: Habits | None, *, shows: bool) -> float:
    """Return how long a node computes wrong numbers before anybody names it, seconds.

    Args:
        fault: a class with that effect.
        habits: of the profile, but for what detectors notice.
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
