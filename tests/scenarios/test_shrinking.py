"""How many replicas a world has, which of them go on, and what their speed is counted as."""

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator import compose
from orchestrator.core import drains
from orchestrator.core.decisions import StartGeneration, WakeAt
from orchestrator.core.events import ControllerStarted, DrainRequested, NodeDisconnected
from orchestrator.core.phases import RunPhase
from orchestrator.core.records import Resize
from orchestrator.core.state import RunState
from orchestrator.policy import shrinking
from orchestrator.protocol.ids import IncidentId, NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import Holding, ShardsHeld
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.simulation import checkers
from orchestrator.worlds.orders import Orders
from tests import runfiles
from tests.conftest import Cluster
from tests.runs import steps_job
from tests.simulated import SimulatedJob

Wide = Callable[..., Cluster]


@pytest.fixture
def wide(cluster_of: Callable[[str], Cluster]) -> Wide:
    """A run that trains with so many replicas of some nodes of one rank each."""

    def make(
        replicas: int,
        nodes_each: int,
        *,
        spares: int = 0,
        least: int = 1,
        stages: int = 1,
        **sections: Any,
    ) -> Cluster:
        text = runfiles.text(
            nodes={"count": replicas * nodes_each, "ranksPerNode": 1, "spares": spares},
            parallelism={"dpReplicate": replicas, "pp": stages},
            trainer={"steps": 1000, "globalBatch": 240, "microBatch": 1},
            recovery={"minReplicas": least},
            **sections,
        )
        cluster = cluster_of(text)
        cluster.tell(ControllerStarted(at=cluster.at(), incarnation=1))
        for index in range(replicas * nodes_each + spares):
            cluster.join(f"node-{index}")
        started(cluster.found())
        cluster.resume()
        cluster.train(5)
        hold(cluster, 5)
        return cluster

    return make


def hold(cluster: Cluster, step: int) -> None:
    """Every node holds its own shard and that of the node before it."""
    world = cluster.state.world
    for place, node in enumerate(world):
        ranks = (place, (place - 1) % len(world))
        held = tuple(Holding(Rank(rank), Step(step)) for rank in ranks)
        cluster.say(node, ShardsHeld(generation=cluster.state.generation, holdings=held))


def started(decisions: list[Any]) -> StartGeneration:
    (order,) = [d for d in decisions if isinstance(d, StartGeneration)]
    return order


def started_none(decisions: list[Any]) -> bool:
    return not [d for d in decisions if isinstance(d, StartGeneration)]


def nodes(*numbers: int) -> tuple[str, ...]:
    return tuple(f"node-{number}" for number in numbers)


def shrunk(wide: Wide) -> Cluster:
    """Three of four replicas of one node, node-1 being gone."""
    cluster = wide(4, 1)
    cluster.lose("node-1")
    cluster.resume()
    cluster.train(3)
    hold(cluster, cluster.state.reached_step)
    return cluster


def until_it_pays(cluster: Cluster) -> None:
    at = shrinking.grows_at(cluster.state, 4)
    cluster.after(at - cluster.now)


# Who goes on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 3])
def test_the_replica_that_lacks_most_nodes_is_dissolved_and_fills_the_gaps_of_others(
    wide: Wide, stages: int
) -> None:
    cluster = wide(3, 3, stages=stages)
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=2))  # all are gone at one moment
    for node in (0, 1, 2, 5, 6, 7, 8):
        cluster.join(f"node-{node}", generation=1, mark=5)
    cluster.lose("node-3")

    order = started(cluster.lose("node-4"))

    assert order.seats == nodes(0, 1, 2, 6, 7, 8)
    assert order.restore is not None
    assert order.restore.step == 5
    assert cluster.state.spares() == nodes(5)


def test_a_gap_is_filled_from_the_replica_that_is_dissolved(wide: Wide) -> None:
    cluster = wide(3, 3)
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=2))
    for node in (1, 2, 5, 6, 7, 8):
        cluster.join(f"node-{node}", generation=1, mark=5)
    for node in (3, 4):
        cluster.lose(f"node-{node}")

    order = started(cluster.lose("node-0"))

    assert order.seats == nodes(5, 1, 2, 6, 7, 8)
    assert "node-5 in place of node-0" in order.reason
    assert cluster.state.replicas == 2


def test_a_spare_is_taken_before_a_replica_is_dissolved(wide: Wide) -> None:
    cluster = wide(4, 1, spares=1)

    order = started(cluster.lose("node-1"))

    assert order.seats == nodes(0, 4, 2, 3)
    assert "replicas" not in order.reason


def test_a_spare_that_is_warm_is_taken_before_one_whose_processes_still_start(wide: Wide) -> None:
    cluster = wide(2, 1, spares=1)
    cluster.join("node-10")

    order = started(cluster.after(0.01).lose("node-1"))

    assert order.seats == nodes(0, 2)


def test_of_spares_whose_processes_still_start_the_one_that_came_first_is_taken(wide: Wide) -> None:
    cluster = wide(2, 1)
    cluster.join("node-11")
    cluster.after(0.01).join("node-10")

    order = started(cluster.after(0.01).lose("node-1"))

    assert order.seats == nodes(0, 11)


def test_a_world_that_grows_takes_the_spares_that_are_warm(wide: Wide) -> None:
    cluster = shrunk(wide)
    cluster.join("node-8")
    until_it_pays(cluster)
    cluster.train(1)
    cluster.join("node-10")
    hold(cluster, cluster.state.reached_step)

    assert cluster.state.incidents[-1].kind == "grow-back"
    assert cluster.seated() == nodes(0, 3, 2, 8)


def test_replicas_that_share_a_node_leave_with_it(cluster_of: Callable[[str], Cluster]) -> None:
    text = runfiles.text(
        nodes={"count": 3, "ranksPerNode": 4},
        parallelism={"dpReplicate": 6, "dpShard": 2},
        trainer={"steps": 1000, "globalBatch": 12},
        recovery={"minReplicas": 3},
    )
    cluster = cluster_of(text)
    assert cluster.run.block == (2, 1)
    assert shrinking.least(cluster.state) == 4, "whole nodes"
    assert [shrinking.fitting(cluster.state, n) for n in (1, 2, 3, 4)] == [0, 4, 6, 6]


def test_a_process_to_be_dismissed_is_named_by_the_rank_it_had(wide: Wide) -> None:
    cluster = wide(4, 1)
    cluster.exit(3)
    cluster.resume()
    cluster.train(3)
    hold(cluster, cluster.state.reached_step)
    orders = Orders(cluster.run)
    cluster.lose("node-1")
    for decision in cluster.decisions:
        if isinstance(decision, StartGeneration):
            orders.start(decision)
    assert orders.started is not None
    assert orders.started.seats == nodes(0, 3, 2)

    replaced = orders.started.dismiss
    begin = orders.begin_on(NodeId("node-3"), "1", {})

    assert begin.ranks == (1,)
    assert replaced == (1,)
    assert begin.dismiss == (), "the process of rank 1 was that of node-1"


def test_a_run_starts_with_fewer_replicas_once_nobody_else_will_come(
    cluster_of: Callable[[str], Cluster],
) -> None:
    cluster = cluster_of(runfiles.text(recovery={"minReplicas": 1}, detection=WARMUP))
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=1))
    cluster.join("node-0")
    for _ in range(29):
        assert started_none(cluster.after(1).beat(step=0))

    cluster.after(1.5).beat(step=0)
    order = started(cluster.found())

    assert order.seats == nodes(0, 0)
    assert "going on with 1 of 2 replicas" in order.reason


WARMUP = {"detectWithin": "10s", "warmupLimit": "30s"}


# Whether to wait --------------------------------------------------------------------------------


def blinking(wide: Wide) -> Cluster:
    """Four replicas of one node; one that had no seat was lost three times, and soon back."""
    cluster = wide(4, 1, spares=1)
    cluster.exit(0)
    cluster.resume()
    cluster.train(3)
    hold(cluster, cluster.state.reached_step)
    for incarnation in (2, 3, 4):
        cluster.lose("node-4")
        cluster.after(0.1).join("node-4", incarnation=incarnation)
    cluster.lose("node-4")
    return cluster


def test_a_node_that_is_known_to_be_back_soon_is_waited_for(wide: Wide) -> None:
    cluster = blinking(wide)

    waiting = cluster.lose("node-1")
    back = cluster.after(0.1).join("node-1", incarnation=2)

    assert started_none(waiting)
    (reason,) = [d.reason for d in waiting if "waiting up to" in d.reason]
    assert "node-1: nodes that were lost came back after 0.1 s, the median of 3" in reason
    assert len(started(back).seats) == 4


def test_a_node_that_is_not_back_soon_after_all_is_not_waited_for_any_longer(wide: Wide) -> None:
    cluster = blinking(wide)
    cluster.lose("node-1")
    assert started_none(cluster.after(0.15).beat(step=cluster.state.reached_step))

    order = started(cluster.after(0.1).beat(step=cluster.state.reached_step))

    assert len(order.seats) == 3
    assert "a node that is lost is back after 0 s (the median of 3), to grow back costs" in (
        order.reason
    )


def test_who_waits_already_is_woken_when_a_node_is_not_worth_waiting_for_any_longer(
    wide: Wide,
) -> None:
    cluster = blinking(wide)
    gone = NodeDisconnected(at=cluster.at(), node=NodeId("node-1"))
    cluster.tell(gone)
    assert "waiting for a node in place of node-1" in cluster.exit(0)[-1].reason

    (wake,) = cluster.after(0.05).lose("node-1")
    again = cluster.after(0.01).tick()

    assert isinstance(wake, WakeAt)
    assert "waiting up to 0.2 s for node-1" in wake.reason
    assert cluster.now < wake.at < cluster.now + 0.3
    assert again == []
    cluster.after(wake.at - cluster.now)
    assert len(started(cluster.tick()).seats) == 3


def test_a_node_that_was_to_be_free_is_not_waited_for_however_soon_others_were_back(
    wide: Wide,
) -> None:
    cluster = blinking(wide)
    drain(cluster.state, "node-1")

    decisions = cluster.lose("node-1")

    assert len(started(decisions).seats) == 3


# Where their state is from ---------------------------------------------------------------------


def test_what_a_node_and_its_buddy_took_with_them_another_replica_has(wide: Wide) -> None:
    cluster = wide(2, 2, spares=2)
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=2))
    for node in (0, 1, 4, 5):
        cluster.join(f"node-{node}", generation=1, mark=5)
    hold(cluster, 5)
    cluster.lose("node-2")

    order = started(cluster.lose("node-3"))

    assert order.restore is not None
    assert order.restore.step == 5
    assert order.seats == nodes(0, 1, 4, 5)
    assert order.restore.sources == nodes(0, 1, 1, 0)
    assert order.restore.staged_as == (0, 1, 0, 3), "of rank 3 there was a copy, of rank 2 none"
    assert "another replica's copy (1 ranks)" in cluster.state.incidents[-1].restored_from


# Growing back ---------------------------------------------------------------------------------


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


def drain(state: RunState, node: str) -> None:

    drains.request(state, DrainRequested(at=state.now, nodes=(NodeId(node),), by="ann"))


# What it is counted as ------------------------------------------------------------------------


def test_training_with_half_the_replicas_counts_as_half_and_its_incident_pays_the_rest() -> None:
    job = SimulatedJob(
        steps_job(
            nodes__spares=0,
            parallelism={"dpReplicate": 2, "dpShard": 2},
            recovery={"minReplicas": 1},
            trainer__options={"step_s": 0.1},
        ),
        [{"when": {"step": 20}, "fault": "lose-node", "node": "node-1"}],
    )

    _, told = job.conduct()

    trained_s = 40 * 0.2  # from step 20 on, at half the speed
    assert told.ledger["lost_capacity"] == pytest.approx(trained_s / 2, rel=0.05)
    assert told.incidents[0].ledger["lost_capacity"] == told.ledger["lost_capacity"]
    assert told.ledger["effective"] == pytest.approx(60 * 0.1, rel=0.05)
    assert sum(told.ledger.values()) == pytest.approx(told.wall_s, abs=1e-6)
    assert (told.replicas, told.replicas_least) == (1, 1)
    assert told.ettr == pytest.approx(told.ledger["effective"] / told.wall_s, abs=1e-6)


def test_what_was_learned_of_steps_is_stretched_with_them(wide: Wide) -> None:
    cluster = wide(4, 1)
    before_s = cluster.state.step_times.quantile(0.5)

    cluster.lose("node-1")

    assert cluster.state.step_times.quantile(0.5) == pytest.approx(before_s * 4 / 3)


def test_the_journal_of_a_world_that_shrinks_and_grows_leads_to_the_same_decisions(
    wide: Wide,
) -> None:
    cluster = shrunk(wide)
    cluster.join("node-1", incarnation=2)
    until_it_pays(cluster)
    cluster.train(1)
    hold(cluster, cluster.state.reached_step)
    cluster.resume()
    assert cluster.state.phase is RunPhase.TRAINING

    fresh = checkers.check(cluster.run, cluster.entries)

    assert [r.after for r in fresh.state.resizes] == [3, 4]
    assert fresh.state.ledger.spans() == cluster.state.ledger.spans()


@pytest.mark.parametrize(
    ("batch", "micro", "replicas", "speed"),
    [(128, 1, 7, (16, 19)), (128, None, 7, (1, 2)), (8, 1, 4, (1, 2)), (100, 3, 6, (6, 8))],
    ids=["many rounds", "one round", "half", "a batch that does not divide"],
)
def test_speed_follows_from_how_many_rounds_the_replica_with_most_of_them_takes(
    batch: int, micro: int | None, replicas: int, speed: tuple[int, int]
) -> None:
    trainer = {"globalBatch": batch} | ({} if micro is None else {"microBatch": micro})
    sections = {"nodes": {"count": 8}, "parallelism": {"dpReplicate": 8}, "trainer": trainer}

    run = compose.parse(runfiles.text(**sections), TrainingRun, "run.yaml")

    assert run.speed(replicas) == speed


@pytest.mark.parametrize(
    ("sections", "least"),
    [
        ({"trainer": {"reduction": "deterministic"}}, 4),
        ({"trainer": {}}, 7),
        ({"trainer": {"reduction": "deterministic", "entrypoint": "mine:main"}}, 7),
        ({"trainer": {}, "recovery": {"minReplicas": 2}}, 2),
        ({"trainer": {"reduction": "deterministic"}, "recovery": {"minReplicas": 7}}, 7),
    ],
    ids=["same bits", "other bits", "who knows", "told to", "told not to"],
)
def test_a_run_that_was_not_told_otherwise_shrinks_only_if_its_result_stays_the_same(
    sections: dict[str, Any], least: int, cluster_of: Callable[[str], Cluster]
) -> None:
    sections["trainer"]["globalBatch"] = 7
    text = runfiles.text(nodes={"count": 7}, parallelism={"dpReplicate": 7}, **sections)

    assert shrinking.least(cluster_of(text).state) == least
