"""Lets faults loose on a simulated cluster: what a real one would suffer, done to its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from orchestrator.core.events import FaultInjected
from orchestrator.core.journal import Entry
from orchestrator.detect.votes import VOTERS_MIN
from orchestrator.faults.catalogue import CATALOGUE
from orchestrator.faults.plan import ArmedFault, Fault
from orchestrator.protocol.ids import NodeId, Rank, Seconds, Step
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import FaultCarriedOut
from orchestrator.worlds.faults import Schedule
from orchestrator.worlds.simulated.agenda import Act
from orchestrator.worlds.simulated.cluster import Cluster
from orchestrator.worlds.simulated.corruption import Corruption, Habit
from orchestrator.worlds.simulated.flaws import Death
from orchestrator.worlds.simulated.node import SimNode
from orchestrator.worlds.simulated.team import Team


class Stage(Protocol):
    """The world, as far as faults change it."""

    cluster: Cluster
    team: Team | None
    corruption: Corruption
    layout: Layout
    controller_killed: bool

    def settle(self) -> None:
        """Bring what trained meanwhile up to now."""

    def change_speed(self) -> None:
        """Have the team go as fast as its slowest node."""


_DEATHS = {
    "kill-rank": Death(-9),
    "segfault-rank": Death(-11),
    "exit-rank": Death(1, "InjectedFaultError", "as planned"),
}


class Breaking:
    """The faults of a plan, and how each of them breaks a simulated cluster."""

    def __init__(self, world: Stage, faults: Sequence[ArmedFault]) -> None:
        self._world, self._schedule = world, Schedule(faults)
        self._all = {armed.index: armed.fault for armed in faults}
        self._done: set[int] = set()

    def resume(self, entries: Sequence[Entry]) -> None:
        """Take over what a journal says; what it says is ordered and not done is owed."""
        self._schedule.resume(entry.event for entry in entries)

    def owed(self, node: NodeId) -> list[int]:
        """Return what is on record for a node and has not happened: the order may be lost."""
        return [index for index in self._schedule.owed(node) if index not in self._done]

    def look(self) -> None:
        """Put on record what is due now; it happens when the controller has it on record."""
        if not self._schedule.left():
            return
        world, team = self._world, self._world.team
        reached = team.pace.done(world.cluster.now) if team and team.pace else Step(0)
        seated = {n.id for n in team.members} if team else set()
        ranks = len(team.seats) if team else 0
        now_due = self._schedule.due(world.cluster.now, reached, seated, ranks)
        due = {armed.index for armed in now_due}
        for armed in self._schedule.left():
            node = self._node_of(armed.fault)
            if armed.index in due or (team and self._steps_reached(armed.fault, team, node)):
                self._schedule.injected(armed.index, node.id if node else NodeId(""))
                world.cluster.emit(_injected(world.cluster.now, armed, node))

    def foresee(self, team: Team) -> None:
        """Look exactly when steps are done that something waits for."""
        assert team.pace is not None
        for armed in self._schedule.left():
            step = armed.fault.when.step
            if step is not None and (moment := team.pace.moment(Step(step))) < float("inf"):
                self._world.cluster.agenda.at(moment, self.look)

    def _node_of(self, fault: Fault) -> SimNode | None:
        team = self._world.team
        if fault.rank is not None and team is not None:
            there = fault.rank < len(team.seats)
            return self._world.cluster.nodes[team.seats[fault.rank]] if there else None
        return self._world.cluster.nodes.get(NodeId(fault.node or ""))

    def _steps_reached(self, fault: Fault, team: Team, node: SimNode | None) -> bool:
        if fault.when.step is None or CATALOGUE[fault.fault].target == "controller":
            return False
        watched = node is not None and node.heard and node.generation == team.generation
        return (
            watched
            and team.pace is not None
            and (team.pace.done(self._world.cluster.now) >= fault.when.step)
        )

    def carry_out(self, index: int, name: NodeId) -> None:
        """Do what the controller has put on record; a second order does nothing."""
        node = self._world.cluster.nodes.get(name)
        if index in self._done or (name and not (node and node.heard)):
            return
        self._done.add(index)
        self._schedule.confirm(index)
        fault = self._all[index]
        if node is not None:
            self._world.cluster.say([node], FaultCarriedOut(index=index))
        self._world.settle()
        self.let_loose(fault, node)

    def let_loose(self, fault: Fault, node: SimNode | None) -> None:  # noqa: C901 - one per kind
        """Break something at once."""
        world, team = self._world, self._world.team
        rank = Rank(fault.rank) if fault.rank is not None else Rank(0)
        if team is not None and rank >= len(team.seats):
            return  # its replica is gone since it was put on record
        match fault.fault:
            case "kill-controller":
                world.controller_killed = True
            case "kill-rank" | "segfault-rank" | "exit-rank" if team:
                team.end(rank, _DEATHS[fault.fault])
            case "freeze-rank" | "spin-rank" | "block-rank" if team:
                team.freeze(rank, "T" if fault.fault == "freeze-rank" else "R")
                self._later(fault, lambda: team.thaw(rank))
            case "slow-rank" if node:
                self._slow(node, 1 / fault.runs_share)
                self._later(fault, lambda: self._slow(node, 1.0))
            case "kill-agent" | "lose-node" if node:
                world.cluster.lose(node, back=fault.fault == "kill-agent")
                self._later(fault, lambda: world.cluster.repair(node))
            case "partition-node" if node:
                world.cluster.part(node)
                self._later(fault, lambda: world.cluster.rejoin(node))
            case "corrupt-shard":
                if newest := world.cluster.store.newest():
                    world.cluster.store.corrupt.add(newest.key)
            case "full-disk" | "read-only-disk":
                world.cluster.store.full = True
                self._later(fault, world.cluster.store.clear)
            case "slow-disk":
                world.cluster.store.delay_s = fault.delay_s
                self._later(fault, world.cluster.store.clear)
            case "flip-bit" | "wrong-matmul" if node and team:
                self._flip(node, team)

    def _flip(self, node: SimNode, team: Team) -> None:
        """Have a replica differ from the others, as its digest shows with the next step."""
        layout = self._world.layout
        replicas = len(team.seats) // layout.shard_count
        if replicas == 1:
            return  # nobody notices
        shards = {layout.shard_of(rank) for rank in team.ranks[node.id]}
        holders = (seat for r, seat in enumerate(team.seats) if layout.shard_of(r) in shards)
        proven = replicas >= VOTERS_MIN
        named = None if proven else tuple(dict.fromkeys(holders))
        step_s = team.pace.usual_s if team.pace is not None else 0.0
        self._world.corruption.corrupt(node.id, Habit(step_s, proven=proven, named=named))
        self._world.corruption.heal(node.id)

    def _slow(self, node: SimNode, times: float) -> None:
        node.slow = times
        self._world.change_speed()

    def _later(self, fault: Fault, act: Act) -> None:
        if fault.lasts_s is not None:
            self._world.cluster.agenda.after(fault.lasts_s, act)


def _injected(at: Seconds, armed: ArmedFault, node: SimNode | None) -> FaultInjected:
    fault = armed.fault
    name = node.id if node else NodeId("")
    return FaultInjected(
        at=at,
        index=armed.index,
        description=fault.describe(),
        target=f"rank {fault.rank}" if fault.rank is not None else name or "controller",
        node=name,
    )
