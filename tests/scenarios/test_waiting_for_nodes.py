"""Who gets a seat when nodes are gone or under suspicion, and how long a run waits for one."""

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.core.decisions import EndRun, StartGeneration
from orchestrator.core.events import ControllerStarted, NodeDisconnected
from orchestrator.core.phases import RunPhase
from orchestrator.protocol.ids import NodeId
from tests import runfiles
from tests.conftest import Cluster
from tests.journals import commit


def started(decisions: list[Any]) -> StartGeneration:
    (order,) = [d for d in decisions if isinstance(d, StartGeneration)]
    return order


def ends(decisions: list[Any]) -> list[EndRun]:
    return [d for d in decisions if isinstance(d, EndRun)]


def search(cluster: Cluster, *, seconds: int) -> None:
    """A recovery that has been reading the durable tier for so long."""
    cluster.start()
    cluster.train(60)
    commit(cluster, 50)
    cluster.exit(1)
    for _ in range(seconds):
        cluster.after(1).beat(step=60)
    assert cluster.state.phase is RunPhase.SEARCHING


def raise_twice(cluster: Cluster, node: str) -> list[Any]:
    """One and the same exception on a node, in two generations."""
    rank = cluster.state.seats.index(NodeId(node))
    step = cluster.state.reached_step
    cluster.exit(rank, 1, step=step, kind="ValueError")
    cluster.resume()
    cluster.exit(rank, 1, step=step, kind="ValueError")
    return cluster.after(2).tick()


@pytest.fixture
def wide(cluster_of: Callable[[str], Cluster]) -> Callable[[int, int], Cluster]:
    """A run that trains on so many nodes of one rank, with so many spares."""

    def make(count: int, spares: int) -> Cluster:
        text = runfiles.text(
            nodes={"count": count, "ranksPerNode": 1, "spares": spares},
            parallelism={},
            trainer={"steps": 1000},
        )
        cluster = cluster_of(text)
        cluster.tell(ControllerStarted(at=cluster.at(), incarnation=1))
        for index in range(count + spares):
            cluster.join(f"node-{index}")
        started(cluster.found())
        cluster.resume()
        cluster.train(5)
        cluster.hold(5)
        return cluster

    return make


def test_a_node_that_blinks_late_in_a_recovery_has_the_time_that_any_node_has(
    cluster: Cluster,
) -> None:
    search(cluster, seconds=61)

    decisions = cluster.tell(NodeDisconnected(at=cluster.at(), node=NodeId("node-1")))

    assert ends(decisions) == []
    cluster.after(1).join("node-1", generation=1, mark=5)
    assert started(cluster.after(1).found(50)).restore is not None


def test_a_controller_that_is_replaced_late_in_a_recovery_waits_for_its_agents(
    cluster: Cluster,
) -> None:
    search(cluster, seconds=61)

    decisions = cluster.after(0.5).tell(ControllerStarted(at=cluster.at(), incarnation=2))

    assert ends(decisions) == []
    for node in ("node-0", "node-1", "node-2"):
        cluster.after(0.1).join(node, generation=1, mark=5)
    assert started(cluster.after(1).found(50)).restore is not None


def test_a_controller_that_starts_when_patience_is_nearly_spent_lets_its_agents_call_first(
    cluster: Cluster,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    cluster.lose("node-2")
    cluster.lose("node-1")
    for _ in range(59):
        cluster.after(1).beat(step=5, heard=("node-0",))
    assert cluster.state.phase is RunPhase.GATHERING

    cluster.after(0.5).tell(ControllerStarted(at=cluster.at(), incarnation=2))
    for _ in range(4):
        assert ends(cluster.after(1).tick()) == []
    cluster.join("node-1", incarnation=2)

    order = started(cluster.after(0.5).join("node-0", generation=1, mark=5))
    assert order.seats == ("node-0", "node-0", "node-1", "node-1")


def test_agents_that_never_call_a_new_controller_do_not_keep_it_waiting_for_ever(
    cluster: Cluster,
) -> None:
    search(cluster, seconds=61)
    cluster.after(0.5).tell(ControllerStarted(at=cluster.at(), incarnation=2))
    begun = cluster.now
    decisions: list[Any] = []

    while not ends(decisions) and cluster.now < begun + 100:
        decisions = cluster.after(1).tick()

    assert "needs 2 nodes and has 0" in ends(decisions)[0].reason
    assert cluster.now - begun == pytest.approx(60, abs=2)


def test_a_node_that_blinks_during_the_first_search_has_the_time_of_a_start(
    cluster: Cluster,
) -> None:
    for node in ("node-0", "node-1", "node-2"):
        cluster.join(node)
    for _ in range(599):
        cluster.after(1).beat(step=0)
    assert cluster.state.phase is RunPhase.SEARCHING
    cluster.tell(NodeDisconnected(at=cluster.at(), node=NodeId("node-2")))
    cluster.after(2).tell(NodeDisconnected(at=cluster.at(), node=NodeId("node-1")))

    assert cluster.state.phase is RunPhase.GATHERING
    cluster.after(1).join("node-1")
    assert started(cluster.after(1).found()).seats[2:] == ("node-1", "node-1")


def test_the_only_spare_goes_to_the_node_that_is_lost_and_not_to_the_one_that_is_blamed(
    wide: Callable[[int, int], Cluster],
) -> None:
    cluster = wide(3, 2)
    assert started(raise_twice(cluster, "node-0")).seats == ("node-3", "node-1", "node-2")
    cluster.resume()
    cluster.train(3)
    cluster.hold(8)
    cluster.lose("node-0")
    cluster.lose("node-4")
    cluster.join("node-5")
    raised = cluster.state.seats.index(NodeId("node-1"))
    cluster.exit(raised, 1, step=8, kind="ValueError")
    cluster.resume()
    cluster.exit(raised, 1, step=8, kind="ValueError")
    cluster.lose("node-2")

    order = started(cluster.after(2).tick())

    assert order.seats == ("node-3", "node-1", "node-5")


def test_a_blamed_node_is_no_spare_while_another_is_free(
    wide: Callable[[int, int], Cluster],
) -> None:
    cluster = wide(2, 2)
    assert started(raise_twice(cluster, "node-0")).seats == ("node-2", "node-1")
    cluster.resume()
    cluster.train(3)

    order = started(cluster.after(0.1).lose("node-1"))

    assert order.seats == ("node-2", "node-3")


def test_a_blamed_node_is_a_spare_if_there_is_no_other(
    wide: Callable[[int, int], Cluster],
) -> None:
    cluster = wide(2, 1)
    assert started(raise_twice(cluster, "node-0")).seats == ("node-2", "node-1")
    cluster.resume()
    cluster.train(3)

    order = started(cluster.after(0.1).lose("node-1"))

    assert order.seats == ("node-2", "node-0")


def test_two_blamed_nodes_do_not_change_places(wide: Callable[[int, int], Cluster]) -> None:
    cluster = wide(2, 1)
    assert started(raise_twice(cluster, "node-0")).seats == ("node-2", "node-1")
    cluster.resume()
    cluster.train(3)
    cluster.hold(8)

    order = started(raise_twice(cluster, "node-2"))

    assert order.seats == ("node-2", "node-1")


def test_a_run_that_goes_on_with_fewer_replicas_does_not_give_up_in_the_moment_of_silence(
    cluster_of: Callable[[str], Cluster],
) -> None:
    text = runfiles.text(
        nodes={**runfiles.NODES, "spares": 0},
        parallelism={"dpReplicate": 2, "dpShard": 2},
        recovery={"spareWait": "1s", "minReplicas": 1},
        trainer={"steps": 1000},
    )
    cluster = cluster_of(text)
    cluster.join("node-0")
    cluster.join("node-1")
    cluster.after(0.1).found()
    cluster.resume()
    cluster.train(5)
    cluster.hold(5)
    cluster.tell(NodeDisconnected(at=cluster.at(), node=NodeId("node-1")))
    cluster.exit(0)
    since = cluster.state.hearing.heard_at(NodeId("node-1"))
    limit = since + cluster.state.timeouts.silence_s

    # Whoever may be back is waited for; when that time is up, something else is told first.
    while cluster.at() < limit - 0.5:
        assert ends(cluster.after(0.4).beat(step=5, heard=("node-0",))) == []
    cluster.now = limit
    assert ends(cluster.exit(1)) == []

    (order,) = [
        d
        for _ in range(4)
        for d in cluster.after(0.5).beat(step=5, heard=("node-0",))
        if isinstance(d, StartGeneration)
    ]
    assert order.seats == ("node-0", "node-0")
