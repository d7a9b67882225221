"""The machines of an experiment: which are in the job, which are away, and how they come back.

Places of a schedule are seats of the job. A fault strikes the machine that had the seat at first
while that is in the job, so that a lemon stays a lemon wherever it is seated; else whoever has the
seat now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from orchestrator.faults.model import FaultModel, Repair
from orchestrator.faults.schedule import Schedule
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.messages import NodeUnusable
from orchestrator.simulation.settings import RANKS_PER_NODE
from orchestrator.worlds.simulated.node import SimNode
from orchestrator.worlds.simulated.world import SimulatedWorld

OPERATOR = "whoever runs the cluster"


class Absence(NamedTuple):
    """Why a machine is away, and for how long."""

    kind: int
    """Class of the fault, index into those of the model; -1 if it has none."""
    out_s: float
    """Before it is multiplied by what the experiment says."""
    repair: str | None = None
    """Which of the model's repairs it goes through; None if there is nothing to repair."""


@dataclass(slots=True)
class Use:
    """How many machines were away."""

    away: set[NodeId] = field(default_factory=set)
    removals: int = 0
    away_most: int = 0

    def take(self, node: NodeId) -> None:
        """Count a machine that is taken out."""
        self.away.add(node)
        self.removals += 1
        self.away_most = max(self.away_most, len(self.away))


class Machines:
    """Takes machines out of service, and brings them back.

    Args:
        world: where they are.
        schedule: says which are lemons.
        model: says how repairs go.
        factor: all times out of service are multiplied by it.
        chance: every draw comes from it.

    Attributes:
        use: how many are away.
        bad: machines that came back as they went, with what still is wrong with them.
        returned: called with a machine that comes back.
        requeue_s: until a scheduler gives another machine in place of one that is away, seconds;
            None if there is none, and machines come back when they are repaired.
    """

    def __init__(
        self,
        world: SimulatedWorld,
        schedule: Schedule,
        model: FaultModel,
        factor: float,
        chance: np.random.Generator,
    ) -> None:
        self._world, self._model, self._factor, self._chance = world, model, factor, chance
        self._all = list(world.cluster.nodes.values())
        self._lemons = {self._all[int(place)].id for place in schedule.lemons}
        self._places = schedule.cluster.nodes
        self._repairs: dict[NodeId, int] = {}
        self._uncordon_on_return: set[NodeId] = set()
        """Those that somebody has to say may be used again, once they are back."""
        self.use = Use()
        self.bad: dict[NodeId, Absence] = {}
        self.returned: Callable[[NodeId], None] = _nobody
        self.requeue_s: float | None = None

    # Who is hit -----------------------------------------------------------------------------------

    def in_job(self) -> list[SimNode]:
        """Return the nodes of the present generation that live and may be used, in rank order."""
        team = self._world.team
        members = team.members if team is not None else self._all[: self._places]
        return [node for node in members if node.alive and node.id not in self.use.away]

    def anybody(self) -> SimNode | None:
        """Return a node of the job, drawn; None if none is well."""
        well = self.in_job()
        return well[int(self._chance.integers(len(well)))] if well else None

    def struck(self, place: int, *, recorded: bool) -> SimNode | None:
        """Return the machine that a fault of one node strikes.

        Args:
            place: first node of the fault.
            recorded: whether it did hit the job, whoever is in it.

        Returns:
            None if it strikes what is not in the job, or already broken.
        """
        well = {node.id: node for node in self.in_job()}
        worn = self._worn(well)
        if worn is not None:
            return worn
        first = self._all[place]
        if first.id in well:
            return first
        if not recorded and first.id in self._lemons and self._spared():
            return None
        seated = self._seated(place)
        if seated is not None and seated.id in well:
            return seated
        return self.anybody() if recorded else None

    def several(self, place: int, count: int) -> list[SimNode]:
        """Return the machines that hang on the same switch or line; at least one is in the job."""
        well = {node.id for node in self.in_job()}
        there = [self._all[place + i] for i in range(count)]
        if not any(node.id in well for node in there):
            seated = [self._seated(place + i) for i in range(count)]
            there = [node for node in seated if node is not None]
        return [n for n in dict.fromkeys(there) if n.alive and n.id not in self.use.away]

    def _seated(self, place: int) -> SimNode | None:
        """Return whose a place is; None if its replica is missing."""
        team = self._world.team
        if team is None:
            return self._all[place]
        if place * RANKS_PER_NODE >= len(team.seats):
            return None
        return self._world.cluster.nodes[team.seats[place * RANKS_PER_NODE]]

    def _spared(self) -> bool:
        """Whether what makes a lemon a lemon would have been the reason."""
        lemons = self._model.lemons
        return lemons is not None and self._chance.random() < 1 - 1 / lemons.hazard

    def _worn(self, well: dict[NodeId, SimNode]) -> SimNode | None:
        """Return a machine that was repaired, if it is struck for being less sound since."""
        lemons = self._model.lemons
        if lemons is None or lemons.after_repair <= 1 or not self._repairs:
            return None
        names = [name for name in self._repairs if name in well]
        extra = np.array(
            [
                (lemons.hazard if name in self._lemons else 1.0)
                * (lemons.after_repair ** self._repairs[name] - 1)
                for name in names
            ]
        )
        sound = len(well) + len(self._lemons) * (lemons.hazard - 1)
        if not names or self._chance.random() >= extra.sum() / (extra.sum() + sound):
            return None
        return well[names[int(self._chance.choice(len(names), p=extra / extra.sum()))]]

    # Out of service, and back ---------------------------------------------------------------------

    def condemn(self, node: SimNode, reason: str, absence: Absence, leaves_s: float) -> bool:
        """Have a node say that it can not be used, and be switched off a little later.

        Returns:
            Whether it was still there.
        """
        if not self._there(node):
            return False
        self._world.cluster.say([node], NodeUnusable(reason=reason))
        self._take(node, absence, leaves_s)
        self._world.cluster.agenda.after(leaves_s, partial(self._switch_off, node))
        return True

    def drain(self, node: SimNode, reason: str, absence: Absence, within_s: float) -> None:
        """Have somebody ask for a node to be free, and take it when its time is up."""
        if not self._there(node):
            return
        self._world.drain([node.id], OPERATOR, reason, within_s)
        self._uncordon_on_return.add(node.id)
        self._take(node, absence, within_s)
        self._world.cluster.agenda.after(within_s, partial(self._switch_off, node))

    def test(self, node: SimNode, absence: Absence, leaves_s: float) -> None:
        """Have a quarantined node be taken away, and used again when it is back."""
        self._uncordon_on_return.add(node.id)
        if not self._there(node):
            return
        self._take(node, absence, leaves_s)
        self._world.cluster.agenda.after(leaves_s, partial(self._switch_off, node))

    def lose(self, node: SimNode, absence: Absence) -> None:
        """Have a node vanish, and come back once it is repaired."""
        if not self._there(node):
            return
        self._world.cluster.lose(node, back=False)
        self._take(node, absence, 0.0)

    def cut_off(self, nodes: Sequence[SimNode], out_s: float) -> None:
        """Have nobody reach nodes for a while, whatever they do meanwhile."""
        for node in nodes:
            self.use.take(node.id)
            self._world.cluster.part(node)
        self._world.cluster.agenda.after(self._factor * out_s, partial(self._rejoin, nodes))

    def repair_aside(self, node: SimNode, absence: Absence) -> None:
        """Have a node that nobody uses be repaired."""
        if self._there(node):
            self._take(node, absence, 0.0)

    def _there(self, node: SimNode) -> bool:
        return node.alive and node.id not in self.use.away

    def _switch_off(self, node: SimNode) -> None:
        self._world.cluster.lose(node, back=False)

    def _rejoin(self, nodes: Sequence[SimNode]) -> None:
        for node in nodes:
            self.use.away.discard(node.id)
            self._world.cluster.rejoin(node)

    def _take(self, node: SimNode, absence: Absence, leaves_s: float) -> None:
        self.use.take(node.id)
        out_s = leaves_s + self._factor * absence.out_s
        if self.requeue_s is not None:
            # Another machine, in truth; to the job it is as good as the same one, repaired.
            out_s, absence = self.requeue_s, absence._replace(repair=None)
        self._world.cluster.agenda.after(out_s, partial(self._back, node, absence))

    def _back(self, node: SimNode, absence: Absence) -> None:
        repair = None if absence.repair is None else self._model.repair_named(absence.repair)
        bad = repair is not None and self._chance.random() < repair.returns_bad
        if repair is not None and bad and self._chance.random() < self._recall:
            # A test before it goes back to the cluster shows that it is as bad as it was.
            again_s = self._factor * drawn_out_s(repair, self._chance)
            self._world.cluster.agenda.after(again_s, partial(self._back, node, absence))
            return
        if repair is not None:
            self._repairs[node.id] = self._repairs.get(node.id, 0) + 1
        self.use.away.discard(node.id)
        if bad:
            self.bad[node.id] = absence
        self.returned(node.id)
        if node.id in self._uncordon_on_return:
            self._uncordon_on_return.discard(node.id)
            self._world.uncordon([node.id], OPERATOR)
        self._world.cluster.lose(node, back=False)
        self._world.cluster.repair(node)

    @property
    def _recall(self) -> float:
        return self._model.diagnosis.offline_recall if self._model.diagnosis is not None else 0.0


def drawn_out_s(repair: Repair, chance: np.random.Generator) -> float:
    """Draw how long one more repair takes, seconds."""
    shares = np.array([part.share for part in repair.parts])
    part = repair.parts[int(chance.choice(len(shares), p=shares / shares.sum()))]
    return float(part.spread.draw(chance, 1)[0])


def _nobody(name: NodeId) -> None:
    """Take no interest in a machine."""
    del name


def names(nodes: Sequence[SimNode]) -> tuple[NodeId, ...]:
    """Return whose they are."""
    return tuple(node.id for node in nodes)
