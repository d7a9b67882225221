"""Which replicas go on when nodes are gone, and where their state is from."""

from collections.abc import Callable

import pytest

from orchestrator.core.decisions import StartGeneration
from orchestrator.core.events import ControllerStarted
from orchestrator.policy import shrinking
from orchestrator.protocol.ids import NodeId
from orchestrator.worlds.orders import Orders
from tests import runfiles
from tests.conftest import Cluster
from tests.replicas import (
    WARMUP,
    Wide,
    hold,
    nodes,
    shrunk,
    started,
    started_none,
    until_it_pays,
)

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
