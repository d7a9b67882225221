"""Conducts in a simulated world what `tests.runs` conducts on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np

from orchestrator import compose
from orchestrator.cli.errors import Exit
from orchestrator.core.journal import Entry
from orchestrator.core.report import Report, report
from orchestrator.core.standing import Act, Actor
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.ids import NodeId, Seconds, Serial, Step
from orchestrator.protocol.runfile import TrainingRun, seconds
from orchestrator.simulation.checkers import Invariants
from orchestrator.simulation.drive import Simulation
from orchestrator.worlds.simulated.corruption import Habit
from orchestrator.worlds.simulated.flaws import Flaws
from orchestrator.worlds.simulated.profile import Constant, Profile
from orchestrator.worlds.simulated.store import Stored
from orchestrator.worlds.simulated.world import SimulatedWorld

LIMIT_S = Seconds(600.0)
_CODES = {"Succeeded": Exit.OK, "Failed": Exit.RUN_FAILED, "Stopped": Exit.INTERRUPTED}


def constant(seconds: float) -> Constant:
    return Constant(seconds, "assumed", "about what a small machine takes")


LOCAL = Profile(
    name="one machine", order=constant(0.002), exit=constant(0.005), trouble=constant(0.1),
    stop=constant(0.02), seat=constant(0.01), warm=constant(0.05), rendezvous=constant(0.02),
    load=constant(0.02), fetch=constant(0.02), read=constant(0.1), first_step=constant(0.02),
    step=constant(0.02), stall=constant(0.0005), copy=constant(0.01), write=constant(0.02),
    commit=constant(0.01), search=constant(0.02), reboot=constant(1.0), gone=constant(0.01),
)  # fmt: skip


@dataclass
class SimulatedJob:
    """One run in virtual time, with the run file and the plan of a real one."""

    run: dict[str, Any]
    faults: list[dict[str, Any]]
    journal: list[Entry] = field(default_factory=list)
    world: SimulatedWorld | None = None
    hushed: tuple[str, float] | None = None
    operations: list[dict[str, Any]] = field(default_factory=list)
    """What operators ask for: `{at: seconds, drain: [node], within: span, reason: text}`, or
    `{at: seconds, uncordon: [node]}`; or what nobody asked for: `{at: seconds, corrupt: node,
    found: span, every: steps, proven: whether, named: [node]}`; or that nobody resumes from a
    checkpoint: `{at: seconds, quarantine: step, reason: text}`; or verdicts about a device:
    `{at: seconds, device: serial, acts: [act], by: who, days_ago: days, reason: text}`."""
    devices: dict[str, str] = field(default_factory=dict)
    """By node, the serial of its machine."""
    failing: list[str] = field(default_factory=list)
    """Serials of machines that fail every test."""
    left: list[Stored] = field(default_factory=list)
    """Checkpoints of a former life."""

    def conduct(self, *_options: str) -> tuple[int, Report]:
        """Run it to its end; return exit code and report."""
        run = msgspec.convert(self.run, TrainingRun)
        plan = msgspec.convert({"kind": "FaultPlan", "faults": self.faults}, FaultPlan)
        options = run.spec.trainer.options
        profile = msgspec.structs.replace(
            LOCAL,
            step=constant(options.get("step_s", 0.005)),
            load=constant(LOCAL.load.value + options.get("restore_s", 0.0)),
        )
        raises_at = options.get("raise_at")
        self.world = SimulatedWorld(
            run,
            compose.check(run, "the run file of a test"),
            profile,
            chance=np.random.Generator(np.random.Philox(0)),
            faults=plan.drawn(),
            replay_every=options.get("replay_every", 0),
            flaws=Flaws(
                "vocabulary is 10, expected 20" if options.get("refuse") else "",
                None if raises_at is None else Step(raises_at),
            ),
        )
        for stored in self.left:
            self.world.cluster.store.leave(stored)
        if self.hushed is not None:
            self._hush_in_time()
        self.world.devices.equip(
            {NodeId(node): Serial(serial) for node, serial in self.devices.items()},
            [Serial(serial) for serial in self.failing],
        )
        for operation in self.operations:
            if "device" in operation:
                self._judge_in_time(**operation)
            elif "corrupt" in operation:
                self._corrupt_in_time(**operation)
            elif "quarantine" in operation:
                self._quarantine_in_time(**operation)
            else:
                self._ask_in_time(**operation)
        simulation = Simulation(
            run, self.world, checkers=[Invariants(loss_of=lambda step: 1.0 / step)]
        )
        over = simulation.conduct(LIMIT_S)
        self.journal = simulation.entries
        told = report(simulation.controller.state)
        assert over, f"still {told.state} after {LIMIT_S:g} s"
        state = simulation.controller.state
        if state.incident is not None and state.incident.kind == "misconfigured":
            return int(Exit.USAGE), told
        return int(_CODES[told.state]), told

    def _ask_in_time(
        self,
        *,
        at: float,
        drain: list[str] | None = None,
        uncordon: list[str] | None = None,
        reason: str = "",
        within: str | None = None,
    ) -> None:
        world = self.world
        assert world is not None
        nodes = [NodeId(node) for node in drain or uncordon or ()]
        ask = partial(world.uncordon, nodes, "ann")
        if drain is not None:
            within_s = None if within is None else seconds(within)
            ask = partial(world.drain, nodes, "ann", reason, within_s)
        world.cluster.agenda.at(Seconds(at), ask)

    def _judge_in_time(
        self,
        *,
        at: float,
        device: str,
        acts: list[str],
        by: Actor = "operator",
        days_ago: float = 0.0,
        reason: str = "",
    ) -> None:
        world = self.world
        assert world is not None
        say = partial(
            world.devices.say,
            Serial(device),
            [Act(act) for act in acts],
            by=by,
            days_ago=days_ago,
            reason=reason,
        )
        if at <= 0:
            say()  # it is on record before anything begins
        else:
            world.cluster.agenda.at(Seconds(at), say)

    def _corrupt_in_time(
        self,
        *,
        at: float,
        corrupt: str,
        found: str,
        every: int = 5,
        proven: bool = True,
        named: list[str] | None = None,
    ) -> None:
        world = self.world
        assert world is not None
        who = None if named is None else tuple(map(NodeId, named))
        habit = Habit(seconds(found), every, proven, who)
        do = partial(world.corruption.corrupt, NodeId(corrupt), habit)
        world.cluster.agenda.at(Seconds(at), do)

    def _quarantine_in_time(self, *, at: float, quarantine: int, reason: str) -> None:
        world = self.world
        assert world is not None
        store = world.cluster.store
        bar = partial(store.bar, Step(quarantine), f"quarantined: {reason}")
        world.cluster.agenda.at(Seconds(at), bar)

    def drain(self, *nodes: str) -> tuple[int, Report]:
        """Run it; once it trains, have nodes be free of it."""
        self.operations = [{"at": 1.0, "drain": list(nodes), "reason": "a test"}]
        return self.conduct()

    def hush(self, node: str, seconds: float) -> tuple[int, Report]:
        """Run it; once it trains, keep a node's agent from running for a while."""
        self.hushed = (node, seconds)
        return self.conduct()

    def _hush_in_time(self) -> None:
        world = self.world
        assert world is not None
        assert self.hushed is not None
        team = world.team
        if team is None or team.pace is None or team.pace.done(world.now) < 10:
            world.cluster.agenda.after(0.02, self._hush_in_time)
            return
        node, seconds = self.hushed
        world.cluster.hush(world.cluster.nodes[NodeId(node)], seconds)

    def entries(self) -> list[Entry]:
        """Return the journal."""
        return self.journal

    def restored(self, generation: int) -> list[tuple[int, int]]:
        """Return step and generation of what each rank of the last generation restored."""
        assert self.world is not None
        assert self.world.team is not None
        assert self.world.team.generation == generation
        return [(save.step, save.generation) for save in self.world.team.origins.values()]

    def leftovers(self) -> list[str]:
        """Return nothing: there is nothing outside this process."""
        return []

    def close(self) -> None:
        """Have nothing to end."""
