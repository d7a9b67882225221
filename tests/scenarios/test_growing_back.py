"""When a run takes back the replicas that it had to do without."""

from collections.abc import Callable

import pytest

from orchestrator import compose
from orchestrator.core.events import ControllerStarted
from orchestrator.core.records import Resize
from orchestrator.policy import shrinking
from orchestrator.policy.switches import EXPECTED_LOSS
from orchestrator.protocol.ids import IncidentId, Seconds, Step
from orchestrator.protocol.runfile import TrainingRun
from tests import runfiles
from tests.conftest import Cluster
from tests.replicas import (
    Wide,
    drain,
    hold,
    nodes,
    shrunk,
    started,
    started_none,
    until_it_pays,
)


def test_a_node_that_is_back_is_taken_along_by_a_restart_for_another_reason(wide: Wide) -> None:
    cluster = shrunk(wide)
    cluster.join("node-1", incarnation=2)

    order = started(cluster.after(0.1).exit(0))

    assert len(order.seats) == 4
    assert "4 of 4 replicas from now on instead of 3" in order.reason


def test_a_world_does_not_grow_before_that_pays(wide: Wide) -> None:
    cluster = shrunk(wide)
    cluster.join("node-1", incarnation=2)
    step = cluster.state.reached_step
    assert "grows back when 1 node is free and warm, 0 so far" in shrinking.standing(cluster.state)
    cluster.after(0.2).beat(step=step)
    pays_at = shrinking.grows_at(cluster.state, 4)
    assert "which pays from" in shrinking.standing(cluster.state)

    before = cluster.after(pays_at - cluster.now - 0.1).beat(step=step + 1, report=True)
    hold(cluster, step + 1)
    assert cluster.state.replicas == 3
    after = cluster.after(0.2).beat(step=step + 2, report=True)
    hold(cluster, step + 2)

    assert started_none([*before, *after])
    assert cluster.state.replicas == 4
    assert cluster.state.incidents[-1].kind == "grow-back"
    assert cluster.state.incidents[-1].lost_steps == 0


def test_a_world_that_does_not_weigh_what_it_loses_grows_as_soon_as_it_can(wide: Wide) -> None:
    cluster = shrunk(wide, EXPECTED_LOSS)
    cluster.join("node-1", incarnation=2)
    step = cluster.state.reached_step

    cluster.after(0.2).beat(step=step)
    hold(cluster, step + 1)
    cluster.after(0.1).beat(step=step + 1, report=True)
    hold(cluster, step + 1)

    assert cluster.now < shrinking.grows_at(shrunk(wide).state, 4)
    assert cluster.state.replicas == 4


def test_one_restart_that_was_stuck_does_not_put_off_growing_in_proportion(wide: Wide) -> None:
    cluster = shrunk(wide)
    cluster.exit(0)
    cluster.resume()
    cluster.train(3)
    hold(cluster, cluster.state.reached_step)
    pays_after_s = shrinking.grows_at(cluster.state, 4) - cluster.state.resizes[-1].at

    cluster.exit(0)
    cluster.after(60.0).resume()

    last = cluster.state.incidents[-1]
    assert last.resumed_at is not None
    assert last.resumed_at - (last.decided_at or 0.0) > 60.0
    after_s = shrinking.grows_at(cluster.state, 4) - cluster.state.resizes[-1].at
    assert after_s == pytest.approx(pays_after_s, rel=0.01)


def test_growing_back_costs_no_budget(wide: Wide) -> None:
    cluster = shrunk(wide)
    spent = {name: budget.spent for name, budget in cluster.state.budgets.items()}
    cluster.join("node-1", incarnation=2)
    until_it_pays(cluster)
    cluster.train(1)
    hold(cluster, cluster.state.reached_step)

    assert cluster.state.replicas == 4
    assert {name: budget.spent for name, budget in cluster.state.budgets.items()} == spent


def test_a_cordoned_node_is_none_to_grow_with(wide: Wide) -> None:
    cluster = shrunk(wide)
    cluster.join("node-1", incarnation=2)
    drain(cluster.state, "node-1")

    assert shrinking.growing_to(cluster.state) == 0
    assert "grows back when 1 node is free and warm, 0 so far" in shrinking.standing(cluster.state)


def test_a_spare_takes_the_place_of_a_node_that_is_to_be_free_before_any_is_to_grow_with(
    wide: Wide,
) -> None:
    cluster = shrunk(wide)
    drain(cluster.state, "node-2")
    cluster.join("node-1", incarnation=2)
    cluster.train(3)
    hold(cluster, cluster.state.reached_step)
    cluster.train(1)

    assert cluster.state.incidents[-1].rung == "planned swap"
    assert cluster.seated() == nodes(0, 3, 1)


def test_a_fault_that_came_again_is_tried_on_a_spare_before_any_is_to_grow_with(
    wide: Wide,
) -> None:
    cluster = wide(4, 1)
    cluster.exit(2, 1, step=5, kind="ValueError")
    cluster.resume()
    cluster.train(1)
    cluster.lose("node-1")
    cluster.resume()
    cluster.train(3)
    cluster.join("node-1", incarnation=2)
    assert cluster.state.world == nodes(0, 3, 2)

    order = started(cluster.exit(2, 1, step=5, kind="ValueError"))

    assert order.seats == nodes(0, 3, 1)


def test_steps_of_another_number_of_replicas_are_compared_only_if_they_have_the_same_bits(
    cluster_of: Callable[[str], Cluster],
) -> None:
    for reduction, told in (("deterministic", [6, 7]), ("fast", [])):
        cluster = cluster_of(
            runfiles.text(
                nodes={"count": 4, "ranksPerNode": 1, "spares": 0},
                parallelism={"dpReplicate": 4},
                trainer={"steps": 1000, "globalBatch": 240, "reduction": reduction},
                recovery={"minReplicas": 2},
            )
        )
        cluster.tell(ControllerStarted(at=cluster.at(), incarnation=1))
        for node in range(4):
            cluster.join(f"node-{node}")
        started(cluster.found())
        cluster.resume()
        cluster.train(5)
        hold(cluster, 5)
        cluster.train(2)
        cluster.lose("node-1")
        cluster.resume()

        for step in (6, 7):
            cluster.after(0.1).beat(step=step, report=True, loss=2.5)

        assert cluster.state.divergences == told, reduction


def test_lost_capacity_is_no_more_charged_to_who_took_a_replica_that_is_back() -> None:
    run = compose.parse(
        runfiles.text(nodes={"count": 4, "ranksPerNode": 1}, parallelism={"dpReplicate": 4}),
        TrainingRun,
        "run.yaml",
    )
    state = compose.controller(run).state
    changes = [("inc-1", 4, 3), ("inc-2", 3, 2), ("inc-3", 2, 3)]
    for at, (incident, before, after) in enumerate(changes):
        resize = Resize(Seconds(at), IncidentId(incident), before, after, Step(at))
        state.resizes.append(resize)
    state.seat(nodes(0, 2, 3), {})

    assert state.shrunk_by == "inc-1"
