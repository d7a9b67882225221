"""What is made of it if many nodes at once are said to have corrupted state."""

from typing import Any

from orchestrator.core.events import DrainCancelled
from orchestrator.core.phases import RunPhase
from orchestrator.policy.quarantine import AGAIN_DAYS
from orchestrator.protocol.ids import NodeId, Rank
from orchestrator.protocol.messages import StateDiverged
from tests.replicas import Wide, hold

DAY_S = 86_400.0


def told(cluster: Any, *nodes: str, proven: bool = False) -> None:
    """Have nodes be named, since the last step that memory has, and train on if that goes."""
    state = cluster.state
    ranks = [Rank(r) for node in nodes for r in state.ranks_of(NodeId(node))]
    fact = StateDiverged(
        generation=state.generation,
        step=state.reached_step,
        since=state.reached_step,
        nodes=tuple(map(NodeId, nodes)),
        ranks=tuple(ranks),
        evidence="digests differ",
        proven=proven,
    )
    cluster.after(0.1).say("node-0", fact)


def go_on(cluster: Any) -> None:
    if cluster.state.phase is RunPhase.BACKING_OFF:
        cluster.rest()
    cluster.resume()
    cluster.train(3)
    hold(cluster, cluster.state.reached_step)


def test_what_proves_many_nodes_guilty_at_once_proves_nothing(wide: Wide) -> None:
    cluster = wide(4, 2)

    told(cluster, "node-1", "node-3", "node-5", proven=True)

    assert cluster.state.quarantined == {}
    (incident,) = cluster.state.incidents
    assert "(not proven)" in incident.findings[0].evidence
    assert "of 3 nodes within a day" in incident.findings[0].evidence


def test_nor_does_what_proves_one_node_after_the_other_guilty_on_the_same_day(wide: Wide) -> None:
    cluster = wide(4, 2, spares=2)
    told(cluster, "node-1", proven=True)
    go_on(cluster)
    first = dict(cluster.state.quarantined)

    told(cluster, "node-3", proven=True)

    assert "proven by replay" in first[NodeId("node-1")].why
    assert "suspected of silent corruption" in cluster.state.quarantined[NodeId("node-3")].why


def test_a_day_later_another_node_can_be_proven_guilty(wide: Wide) -> None:
    cluster = wide(4, 2, spares=2)
    told(cluster, "node-1", proven=True)
    go_on(cluster)
    cluster.after(DAY_S).beat(step=cluster.state.reached_step)

    told(cluster, "node-3", proven=True)

    assert "proven by replay" in cluster.state.quarantined[NodeId("node-3")].why


def test_a_suspicion_counts_a_second_time_for_days_only(wide: Wide) -> None:
    cluster = wide(4, 2)
    told(cluster, "node-1")
    go_on(cluster)
    cluster.after(AGAIN_DAYS * DAY_S + 1).beat(step=cluster.state.reached_step)

    told(cluster, "node-1")

    assert cluster.state.quarantined == {}


def test_that_all_who_hold_a_shard_were_named_tells_against_none_of_them(wide: Wide) -> None:
    cluster = wide(2, 20)
    pair = cluster.state.seats[1], cluster.state.seats[21]
    told(cluster, *pair)
    go_on(cluster)

    told(cluster, pair[0])

    assert cluster.state.quarantined == {}


def test_if_all_who_hold_a_shard_are_named_again_it_stops(wide: Wide) -> None:
    cluster = wide(2, 20)
    pair = cluster.state.seats[1], cluster.state.seats[21]
    told(cluster, *pair)
    go_on(cluster)

    told(cluster, *pair)

    assert cluster.state.phase is RunPhase.FAILED
    assert "nobody stands out" in cluster.state.end_reason


def test_what_a_node_was_suspected_of_is_forgotten_once_it_is_uncordoned(wide: Wide) -> None:
    cluster = wide(4, 2)
    told(cluster, "node-1")
    go_on(cluster)
    cluster.tell(DrainCancelled(at=cluster.at(), nodes=(NodeId("node-1"),), by="ann"))

    told(cluster, "node-1")

    assert cluster.state.quarantined == {}
