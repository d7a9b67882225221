"""Whether a run waits for a node that is gone, or goes on with fewer replicas."""

from orchestrator.core.decisions import WakeAt
from orchestrator.core.events import NodeDisconnected
from orchestrator.policy.switches import EXPECTED_LOSS
from orchestrator.protocol.ids import NodeId
from tests.conftest import Cluster
from tests.replicas import Wide, drain, hold, started, started_none


def blinking(wide: Wide, *off: str) -> Cluster:
    """Four replicas of one node; one that had no seat was lost three times, and soon back."""
    cluster = wide(4, 1, spares=1, off=off)
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


def test_a_run_that_does_not_weigh_what_it_loses_shrinks_at_once(wide: Wide) -> None:
    cluster = blinking(wide, EXPECTED_LOSS)

    order = started(cluster.lose("node-1"))

    assert len(order.seats) == 3


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
