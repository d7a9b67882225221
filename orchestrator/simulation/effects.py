"""Lets a schedule of faults act on a simulated cluster, each class in the way in which it shows.

The schedule is the ground truth; the controller sees no more than what agents and connections say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from math import isfinite
from typing import NamedTuple

import numpy as np

from orchestrator.faults.model import FaultClass, FaultModel
from orchestrator.faults.schedule import Schedule
from orchestrator.protocol.ids import NodeId, Seconds
from orchestrator.simulation import constants
from orchestrator.simulation.machines import (
    Absence,
    Machines,
    drawn_out_s,
    names,
)
from orchestrator.simulation.ranks import Ranks
from orchestrator.simulation.signs import Sign, sign_of, sort_of
from orchestrator.simulation.speeds import Speeds
from orchestrator.simulation.struck import Struck
from orchestrator.simulation.wrong import WrongNumbers
from orchestrator.worlds.simulated.flaws import Death
from orchestrator.worlds.simulated.node import SimNode
from orchestrator.worlds.simulated.profile import Habits
from orchestrator.worlds.simulated.watching import Watch
from orchestrator.worlds.simulated.world import SimulatedWorld

SUSPECTED, RELAPSED = "false-eviction", "relapse"
FALSE_ALARM = "false-alarm"
ABORTED = Death(-6)
ENDED = Death(-15)
"""Somebody ends the job, to start it again."""
_OF_JOB = ("raise", "hang", "jam", "save-fails", "slow", "drain", "nothing")
_ANNOUNCED = ("vanish", "taken", "drain")
_STOPS = ("vanish", "abort", "stall", "unlinked", "cut", "raise", "hang", "jam")
NOT_FINITE = Death(1, "FloatingPointError", "the loss is not finite")


class Fault(NamedTuple):
    """One row of a schedule; see there for units."""

    at_s: float
    kind: int
    node: int
    nodes: int
    fatal: bool
    slow: float
    lasts_s: float
    out_s: float
    notice_s: float
    rollback: bool


class Chances(NamedTuple):
    """Where draws come from: one does not change what comes of the other."""

    faults: np.random.Generator
    silent: np.random.Generator
    """Of which kind silent corruption is, and whether detectors notice it."""


class Effects:
    """Everything that befalls one run.

    Args:
        world: to which.
        schedule: what.
        model: of which it was drawn.
        recorded: classes that did hit the job, as a record says.
        machines: which it strikes, and when they are back.
        habits: of a system that is not ours, when faults become known to it; None, or with `own`
            notice: when our detectors find them.
        chances: every draw comes from them.

    Attributes:
        log: what was let loose, by time.
        unseen: how many of each class nobody would notice: they were not let loose.
        missed: how many of each class struck what was not in the job, or broken already.
    """

    def __init__(
        self,
        world: SimulatedWorld,
        schedule: Schedule,
        model: FaultModel,
        *,
        recorded: frozenset[str],
        machines: Machines,
        habits: Habits | None,
        chances: Chances,
    ) -> None:
        self._world, self._model, self._machines, self._habits = world, model, machines, habits
        self._classes, self._recorded, self._chance = schedule.classes, recorded, chances.faults
        self._signs = [sign_of(each) for each in schedule.classes]
        self.speeds = Speeds(world, model.diurnal.amplitude if model.diurnal else 0.0)
        machines.returned = self._returned
        self.log: list[Struck] = []
        self.unseen: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self._outages = 0
        self._ranks = Ranks(world, machines, chances.faults)
        self._wrong = WrongNumbers(world, machines, habits, model.corruption, chances.silent)
        self._worn_out: dict[NodeId, Absence] = {}
        """Nodes that are slow until they are repaired."""
        self._seats: frozenset[NodeId] = frozenset()
        self._enter(schedule)

    def _enter(self, schedule: Schedule) -> None:
        """Put on the agenda what anybody would notice, and count the rest."""
        columns = schedule.faults
        nothing = np.array([sign == "nothing" for sign in self._signs])[columns.kind]
        network = np.array([each.effect == "network" for each in self._classes])[columns.kind]
        quiet = nothing | (network & ~columns.fatal & (columns.slow == 0))
        for kind, count in enumerate(np.bincount(columns.kind[quiet]).tolist()):
            if count:
                self.unseen[self._classes[kind].name] = count
        noticed = columns.taken(~quiet)
        rows = zip(*(getattr(noticed, name).tolist() for name in Fault._fields), strict=True)
        for row in rows:
            fault = Fault(*row)
            ahead_s = fault.notice_s if self._signs[fault.kind] in _ANNOUNCED else 0.0
            moment = Seconds(max(fault.at_s - ahead_s, 0.0))
            self._world.cluster.agenda.at(moment, partial(self._strike, fault))

    @property
    def silent(self) -> dict[str, int]:
        """How many silent corruptions there were of each kind, noticed by detectors or missed."""
        return dict(sorted(self._wrong.kinds.items()))

    def raise_alarms(self, moments: Sequence[float], watch: Watch) -> None:
        """Have detectors of silent corruption name a healthy node at some moments, seconds."""
        for moment in moments:
            self._world.cluster.agenda.at(Seconds(moment), partial(self._alarm, watch))

    def _alarm(self, watch: Watch) -> None:
        self._world.settle()
        node = self._machines.anybody()
        if node is not None:
            now = self._world.now
            struck = Struck(at=now, name=FALSE_ALARM, sort="mistaken", nodes=(node.id,))
            self.log.append(struck)
            self._wrong.alarm(node, struck, watch)

    # One fault ------------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> None:
        """Have a fault happen, or be announced."""
        self._world.settle()
        each, sign = self._classes[fault.kind], self._signs[fault.kind]
        if not fault.fatal and fault.slow > 0:
            sign = "slow"
        nodes = [] if fault.node < 0 else self._hit(fault, each)
        if fault.node >= 0 and not nodes:
            self.missed[each.name] += 1
            return
        sort = sort_of(each, sign, fatal=fault.fatal)
        struck = Struck(at=self._world.now, name=each.name, sort=sort, nodes=names(nodes))
        self.log.append(struck)
        struck.hidden_s = self._hidden_s(each, sign)
        if struck.hidden_s > 0:
            self._stand_still(nodes)
            become_known = partial(self._become_known, sign, fault, struck, nodes)
            self._world.cluster.agenda.after(struck.hidden_s, become_known)
        else:
            self._happen(sign, fault, struck, nodes)

    def _happen(self, sign: Sign, fault: Fault, struck: Struck, nodes: list[SimNode]) -> None:
        """Have a fault show in its own way; our detectors are to find it."""
        if sign in _OF_JOB:
            self._befall_job(sign, fault, struck, nodes)
            return
        for node in nodes:
            self._befall(node, sign, fault, struck)
        if sign == "cut":
            self._ranks.jam(nodes)
            self._machines.cut_off(nodes, fault.out_s)

    # Habits of other systems ----------------------------------------------------------------------

    def _hidden_s(self, each: FaultClass, sign: Sign) -> float:
        """Return how long training stands still before anybody does something about a fault."""
        if self._habits is None or sign not in _STOPS:
            return 0.0
        detect_s = self._habits.detect_s(each)
        if detect_s is None:
            return 0.0
        if sign == "vanish":
            detect_s = max(detect_s, self._world.cluster.profile.gone.value)
        return detect_s + self._habits.localise_s(each)

    def _stand_still(self, nodes: Sequence[SimNode]) -> None:
        anybody = self._machines.anybody()
        for node in nodes or ([anybody] if anybody is not None else []):
            self._ranks.freeze(node)

    def _become_known(self, sign: Sign, fault: Fault, struck: Struck, nodes: list[SimNode]) -> None:
        """Have everybody know what was found and localised by then."""
        self._world.settle()
        if sign in ("hang", "jam"):
            self._ranks.end_any(ENDED)
        elif sign in _OF_JOB:
            self._befall_job(sign, fault, struck, nodes)
        elif sign == "cut":
            self._machines.cut_off(nodes, fault.out_s)
        else:
            for node in nodes:
                words = f"found and localised: {struck.name}"
                self._machines.condemn(node, words, self._absence(fault), constants.LEAVES.value)

    def _hit(self, fault: Fault, each: FaultClass) -> list[SimNode]:
        if fault.nodes > 1:
            return self._machines.several(fault.node, fault.nodes)
        node = self._machines.struck(fault.node, recorded=each.name in self._recorded)
        return [] if node is None else [node]

    def _befall_job(
        self, sign: Sign, fault: Fault, struck: Struck, nodes: Sequence[SimNode]
    ) -> None:
        """Have happen what is nobody's fault, or not a matter of one node."""
        match sign:
            case "raise":
                if fault.rollback:
                    self._world.cluster.spoil_newest()
                struck.nodes = self._ranks.fail() or struck.nodes
            case "hang":
                self._ranks.hang()
            case "jam":
                # One that is of a single node is where it comes from, each time.
                own = self._classes[fault.kind].blast == "node"
                self._ranks.jam(nodes if own else self._machines.in_job())
            case "save-fails":
                self._fail_saves(fault.lasts_s)
            case "slow":
                self._slow(fault, struck, nodes)
            case "drain":
                self._plan(fault, struck)
            case "nothing":
                pass  # a user's own class whose effect has nothing to see; the packaged are counted
            case _:
                raise AssertionError(f"{sign} is of a node")

    def _befall(self, node: SimNode, sign: Sign, fault: Fault, struck: Struck) -> None:
        """Have happen what is the fault of one node."""
        absence = self._absence(fault)
        match sign:
            case "vanish" | "taken":
                if fault.notice_s > 0:
                    self._announce(node, struck.name, absence, fault)
                else:
                    self._machines.lose(node, absence)
                self._suspect(sign)
            case "abort":
                self._ranks.end(node, ABORTED)
                self._probe(node, struck.name, absence, constants.PROBE_AFTER_DEATH.value)
            case "stall":
                self._ranks.freeze(node)
                self._probe(
                    node, struck.name, absence, self._until_look(constants.GPU_PROBE_EVERY.value)
                )
            case "unlinked":
                self._ranks.jam([node])
                self._probe(
                    node, struck.name, absence, self._until_look(constants.LINK_PROBE_EVERY.value)
                )
            case "wrong":
                each = self._classes[fault.kind]
                self._wrong.begin(node, each, struck, absence, shows=fault.fatal)
                if fault.fatal:
                    self._ranks.end(node, NOT_FINITE)
            case "cut":
                self._ranks.freeze(node)
            case _:
                raise AssertionError(f"{sign} is of the job")

    def _absence(self, fault: Fault) -> Absence:
        each = self._classes[fault.kind]
        if each.out is not None:
            return Absence(fault.kind, fault.out_s, each.out)
        return Absence(
            fault.kind, fault.lasts_s if isfinite(fault.lasts_s) else constants.PLANNED_OUT.value
        )

    # Nodes ----------------------------------------------------------------------------------------

    def _until_look(self, every_s: float) -> float:
        return float(self._chance.uniform(0, every_s))

    def _probe(self, node: SimNode, name: str, absence: Absence, after_s: float) -> None:
        """Have an agent name its node once it has looked."""

        def look() -> None:
            if self._machines.condemn(
                node, f"a probe found: {name}", absence, constants.LEAVES.value
            ):
                self._suspect("abort")

        self._world.cluster.agenda.after(after_s, look)

    def _suspect(self, sign: Sign) -> None:
        """Now and then have a healthy node be taken out with a bad one."""
        share = self._model.diagnosis.false_evictions if self._model.diagnosis is not None else 0.0
        if sign == "taken" or self._chance.random() >= share:
            return
        node = self._machines.anybody()
        if node is not None:
            self.log.append(
                Struck(at=self._world.now, name=SUSPECTED, sort="mistaken", nodes=(node.id,))
            )
            words = "a test of a healthy node failed"
            self._machines.condemn(
                node, words, Absence(-1, constants.SUSPECTED_OUT.value), constants.LEAVES.value
            )

    def _plan(self, fault: Fault, struck: Struck) -> None:
        """Have an operation need a node, and give it back."""
        node = self._machines.anybody()
        if node is not None:
            struck.nodes = (node.id,)
            self._announce(node, struck.name, Absence(-1, constants.PLANNED_OUT.value), fault)

    def _announce(self, node: SimNode, name: str, absence: Absence, fault: Fault) -> None:
        """Say that a node will be taken, to whoever can make use of that, and take it then."""
        notice_s = max(fault.at_s - self._world.now, 0.0)
        if self._habits is None or self._habits.notice.value == "own":
            self._machines.drain(node, name, absence, notice_s)
            return

        def take() -> None:
            self._world.settle()
            self._machines.condemn(node, f"planned: {name}", absence, constants.LEAVES.value)

        self._world.cluster.agenda.after(notice_s, take)

    # Speed and storage ----------------------------------------------------------------------------

    def _slow(self, fault: Fault, struck: Struck, nodes: Sequence[SimNode]) -> None:
        if len(nodes) == 1 and self._classes[fault.kind].blast == "node":
            self.speeds.slow(fault.slow, fault.lasts_s, nodes[0].id)
            struck.until = Seconds(self._world.now + fault.lasts_s)
            if not isfinite(fault.lasts_s):
                self._worn_out[nodes[0].id] = self._absence(fault)
        else:
            self.speeds.slow(fault.slow, fault.lasts_s)

    def _fail_saves(self, lasts_s: float) -> None:
        store = self._world.cluster.store
        self._outages += 1
        store.down = True

        def end() -> None:
            self._outages -= 1
            store.down = self._outages > 0

        self._world.cluster.agenda.after(lasts_s, end)

    # What the controller does about it ------------------------------------------------------------

    def seated(self, seats: Sequence[NodeId]) -> None:
        """Take in who has a seat from now on.

        A machine that is bad fails again some time after it is seated. One that is slow and was put
        aside is repaired: whoever put it aside has had a reason. What was quarantined is tested.
        """
        now = frozenset(seats)
        for name in sorted(now & self._machines.bad.keys()):
            absence = self._machines.bad.pop(name)
            node = self._world.cluster.nodes[name]
            after_s = float(self._chance.exponential(constants.RELAPSES_MEAN.value))
            self._world.cluster.agenda.after(after_s, partial(self._relapse, node, absence))
        for name in sorted((self._seats - now) & self._worn_out.keys()):
            node = self._world.cluster.nodes[name]
            self._machines.repair_aside(node, self._worn_out.pop(name))
        self._wrong.seated(now)
        self._seats = now

    def _returned(self, name: NodeId) -> None:
        self._worn_out.pop(name, None)
        self._world.corruption.heal(name)
        self.speeds.heal(name)

    def _relapse(self, node: SimNode, absence: Absence) -> None:
        """Have a machine fail as it failed before."""
        if node not in self._machines.in_job() or absence.repair is None:
            return
        self._world.settle()
        self.log.append(Struck(at=self._world.now, name=RELAPSED, sort="seen", nodes=(node.id,)))
        out_s = drawn_out_s(self._model.repair_named(absence.repair), self._chance)
        self._ranks.end(node, ABORTED)
        self._probe(
            node, RELAPSED, absence._replace(out_s=out_s), constants.PROBE_AFTER_DEATH.value
        )
