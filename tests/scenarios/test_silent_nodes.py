"""A node that falls silent on an open connection is hung up on, so that it can come back."""

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.core.decisions import DisconnectNode, StartGeneration
from orchestrator.core.events import NodeDisconnected
from orchestrator.core.phases import RunPhase
from orchestrator.protocol.ids import NodeId
from tests import runfiles
from tests.journals import commit

NO_SPARE = runfiles.text(nodes={**runfiles.NODES, "spares": 0}, trainer={"steps": 1000})


def fall_silent(cluster: Any, *others: str, seconds: float = 8.0) -> list[Any]:
    """Only the others are heard; every connection stays open."""
    decisions: list[Any] = []
    for _ in range(int(seconds / 0.5)):
        decisions += cluster.after(0.5).beat(step=cluster.state.reached_step, heard=others)
    return decisions


def hung_up(decisions: list[Any]) -> list[str]:
    return [d.node for d in decisions if isinstance(d, DisconnectNode)]


def starts(decisions: list[Any]) -> list[StartGeneration]:
    return [d for d in decisions if isinstance(d, StartGeneration)]


@pytest.fixture
def pair(cluster_of: Callable[[str], Any]) -> Any:
    """Two nodes that train, and no spare."""
    cluster = cluster_of(NO_SPARE)
    cluster.join("node-0")
    cluster.join("node-1")
    cluster.after(0.1).found()
    cluster.resume()
    cluster.train(10)
    cluster.hold(10)
    return cluster


def test_a_silent_node_that_no_spare_can_replace_is_hung_up_on_and_has_its_seat_when_it_is_back(
    pair: Any,
) -> None:
    decisions = fall_silent(pair, "node-0")

    assert hung_up(decisions) == ["node-1"]
    assert pair.state.phase is RunPhase.GATHERING
    (order,) = starts(pair.after(1).join("node-1", generation=1, mark=5))
    assert order.seats == ("node-0", "node-0", "node-1", "node-1")


def test_a_silent_node_that_a_spare_replaced_becomes_a_spare_when_it_is_back(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)

    decisions = fall_silent(cluster, "node-0", "node-2")

    assert hung_up(decisions) == ["node-1"]
    assert starts(decisions)[0].seats[2:] == ("node-2", "node-2")
    cluster.join("node-1", generation=1, mark=5)
    assert cluster.state.spares() == ("node-1",)


def test_a_silent_spare_is_hung_up_on_once_and_counts_again_when_it_is_back(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)

    decisions = fall_silent(cluster, "node-0", "node-1", seconds=30)

    assert hung_up(decisions) == ["node-2"]
    assert starts(decisions) == []
    assert cluster.state.spares() == ()
    cluster.join("node-2")
    assert cluster.state.spares() == ("node-2",)


def test_a_node_that_falls_silent_again_in_one_incident_is_hung_up_on_again(pair: Any) -> None:
    pair.train(10)
    commit(pair, 20)
    assert hung_up(fall_silent(pair, "node-0")) == ["node-1"]
    # Back, and its seat has to wait for the durable tier.
    pair.after(1).join("node-1", generation=1, mark=5)
    assert pair.state.phase is RunPhase.SEARCHING

    decisions = fall_silent(pair, "node-0")

    assert hung_up(decisions) == ["node-1"]
    assert starts(pair.after(0.1).found(20)) == []
    assert len(starts(pair.after(1).join("node-1", generation=1, mark=5))) == 1


def test_a_node_whose_connection_is_closed_is_not_hung_up_on(pair: Any) -> None:
    pair.tell(NodeDisconnected(at=pair.at(), node=NodeId("node-1")))

    assert hung_up(fall_silent(pair, "node-0")) == []
    assert pair.state.nodes[NodeId("node-1")].lost


def test_nobody_is_hung_up_on_for_what_was_not_heard_while_nobody_listened(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)

    assert cluster.after(3600).tick() == []
    assert fall_silent(cluster, "node-0", "node-1", "node-2") == []


def test_a_node_that_came_back_and_fell_silent_before_it_had_its_seats_again_is_replaced(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    cluster.exit(0)  # which brings no new step: the next restart waits a moment
    cluster.resume()
    cluster.after(1).join("node-1", incarnation=2)

    cluster.tell(NodeDisconnected(at=cluster.at(), node=NodeId("node-1")))
    decisions = fall_silent(cluster, "node-0", "node-2", seconds=12)

    (order,) = starts(decisions)
    assert order.seats[2:] == ("node-2", "node-2")
