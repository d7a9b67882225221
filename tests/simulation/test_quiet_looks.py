"""A world that is hardly looked at while nothing is amiss tells the same story as one that is."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest

from orchestrator import compose
from orchestrator.core.events import CheckpointCommitted, CopiesHeld, Reported, Telemetry, Together
from orchestrator.core.report import Report, report
from orchestrator.protocol.ids import NodeId, Rank, Seconds
from orchestrator.protocol.messages import ShardsHeld
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.simulation.checkers import Invariants
from orchestrator.simulation.drive import Simulation
from orchestrator.worlds.simulated import profiles
from orchestrator.worlds.simulated.world import SimulatedWorld

NODES = 40
UNTIL_S = Seconds(2400.0)
Fault = Callable[[SimulatedWorld], None]


def run_of(nodes: int, least: int | None = None, durable: int = 60) -> TrainingRun:
    text: dict[str, Any] = {
        "apiVersion": "holdfast.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "quiet"},
        "spec": {
            "nodes": {"count": nodes, "ranksPerNode": 2, "spares": 2},
            "parallelism": {"dpReplicate": nodes // 4},
            "trainer": {"steps": 1_000_000, "globalBatch": 2 * nodes},
            "checkpoint": {"everySteps": durable, "memoryEverySteps": 6, "keepLast": 2},
            "detection": {"detectWithin": "10s", "warmupLimit": "600s"},
            "recovery": {
                "hardwareBudget": 100,
                "softwareBudget": 100,
                "spareWait": "1h",
                "minReplicas": least,
            },
        },
    }
    return msgspec.convert(text, TrainingRun)


def conduct(
    fault: Fault | None,
    look_every_s: float,
    nodes: int = NODES,
    least: int | None = None,
    durable: int = 60,
) -> tuple[Report, Any]:
    run = run_of(nodes, least, durable)
    world = SimulatedWorld(
        run,
        compose.check(run, "the run of a test"),
        profiles.packaged("measured"),
        chance=np.random.Generator(np.random.Philox(1)),
        look_every_s=look_every_s,
    )
    if fault is not None:
        world.cluster.agenda.at(Seconds(1003.3), partial(fault, world))
    simulation = Simulation(run, world, checkers=[Invariants()])
    assert not simulation.conduct(UNTIL_S)
    return report(simulation.controller.state), [entry.event for entry in simulation.entries]


def lose(world: SimulatedWorld) -> None:
    world.cluster.lose(world.cluster.nodes[NodeId("node-7")], back=True)


def part(world: SimulatedWorld) -> None:
    world.cluster.part(world.cluster.nodes[NodeId("node-7")])


def freeze(world: SimulatedWorld) -> None:
    assert world.team is not None
    world.settle()
    world.team.freeze(Rank(13), "T")


def nothing_known(world: SimulatedWorld) -> None:
    assert world.team is not None
    world.settle()
    world.team.freeze(Rank(13), "S")


def drain(world: SimulatedWorld) -> None:
    world.drain([NodeId("node-7")], "ann", within_s=600.0)


def hurry(world: SimulatedWorld) -> None:
    world.drain([NodeId("node-7")], "ann", within_s=15.0)


def slow_down(world: SimulatedWorld) -> None:
    world.settle()
    world.cluster.nodes[NodeId("node-7")].slow = 1.2
    world.change_speed()


@pytest.mark.parametrize(
    "fault", [None, lose, part, freeze, nothing_known, drain, hurry, slow_down]
)
def test_hardly_looking_changes_nothing_but_how_much_is_told(fault: Fault | None) -> None:
    often, events = conduct(fault, 0.0)
    seldom, few = conduct(fault, 600.0)

    assert [i.kind for i in seldom.incidents] == [i.kind for i in often.incidents]
    assert [i.rung for i in seldom.incidents] == [i.rung for i in often.incidents]
    for one, other in zip(seldom.incidents, often.incidents, strict=True):
        assert one.detected_after_s == pytest.approx(other.detected_after_s, abs=2.0)
        assert one.lost_steps == pytest.approx(other.lost_steps, abs=1)
    for bucket, spent_s in often.ledger.items():
        assert seldom.ledger[bucket] == pytest.approx(spent_s, abs=8.0), bucket
    assert len([e for e in few if isinstance(e, Telemetry)]) < 0.06 * len(events)
    assert any(isinstance(e, Together) for e in few)
    assert any(isinstance(e, CopiesHeld) and e.copied for e in few)


def test_a_short_world_grows_back_from_the_newest_step_with_a_slow_spare_as_well() -> None:
    def shrink(world: SimulatedWorld) -> None:
        for name in ("node-2", "node-3", "node-4"):
            world.cluster.lose(world.cluster.nodes[NodeId(name)], back=False)
        # It is swapped for what is left of the replica that is dissolved, and is free itself.
        world.cluster.agenda.after(100.0, partial(slow_down, world))
        repaired = partial(world.cluster.repair, world.cluster.nodes[NodeId("node-4")])
        world.cluster.agenda.after(400.0, repaired)

    found, _ = conduct(shrink, 600.0, least=5)

    restarts = [i for i in found.incidents if i.kind != "straggler"]
    assert [i.rung for i in restarts] == ["shrink", "planned swap", "grow back"]
    assert restarts[-1].lost_steps <= 1
    assert restarts[-1].began_s < 1500.0


def test_a_world_that_was_restarted_without_a_loss_is_told_of_together_again() -> None:
    report_, events = conduct(drain, 600.0)

    assert [i.rung for i in report_.incidents] == ["planned swap"]
    later = [event for event in events if event.at > 1300.0]
    assert any(isinstance(event, CopiesHeld) and event.copied for event in later)
    held = [e for e in later if isinstance(e, Reported) and isinstance(e.fact, ShardsHeld)]
    assert held == []


def test_a_small_world_is_told_of_node_by_node() -> None:
    _, events = conduct(lose, 600.0, nodes=8)

    assert not any(isinstance(e, Together | CopiesHeld) for e in events)


def test_a_world_that_waits_is_looked_at_now_and_then_though_one_of_its_nodes_is_to_be_free() -> (
    None
):
    def lose_too_many(world: SimulatedWorld) -> None:
        for name in ("node-1", "node-2", "node-3"):
            world.cluster.lose(world.cluster.nodes[NodeId(name)], back=False)
        world.cluster.agenda.at(Seconds(1100.0), partial(drain, world))

    _, events = conduct(lose_too_many, 600.0)

    waiting = [event for event in events if 1400.0 < event.at < 1500.0]
    assert 0 < len(waiting) <= 5


def test_a_slow_node_that_is_kept_is_not_looked_at_closely_for_ever() -> None:
    def slow_down_more_than_there_are_spares(world: SimulatedWorld) -> None:
        world.settle()
        for name in ("node-5", "node-6", "node-7"):
            world.cluster.nodes[NodeId(name)].slow = 1.4
        world.change_speed()

    report_, events = conduct(slow_down_more_than_there_are_spares, 600.0)

    assert {i.kind for i in report_.incidents} == {"straggler"}
    later = [event for event in events if event.at > 1800.0]
    assert len(later) < 30


def test_saves_that_are_due_before_the_last_one_is_durable_take_turns_at_the_tier() -> None:
    write_s = profiles.packaged("measured").write.value

    _, events = conduct(None, 0.0, nodes=8, durable=6)

    commits = [event for event in events if isinstance(event, CheckpointCommitted)]
    assert len(commits) > 0.9 * UNTIL_S / write_s
    for one, other in pairwise(commits):
        assert other.at - one.at >= write_s - 8.0  # a look is up to a step late
        assert other.step > one.step


def test_restarts_of_one_run_differ_as_the_profile_says_and_with_one_seed_never() -> None:
    def lose_thrice(world: SimulatedWorld) -> None:
        for number, name in enumerate(("node-3", "node-7", "node-11")):
            gone = partial(world.cluster.lose, world.cluster.nodes[NodeId(name)], back=True)
            world.cluster.agenda.after(300.0 * number, gone)

    once, _ = conduct(lose_thrice, 600.0)
    again, _ = conduct(lose_thrice, 600.0)

    took = [incident.first_step_after_s for incident in once.incidents]
    assert len(set(took)) == 3
    assert took == [incident.first_step_after_s for incident in again.incidents]
