"""Which way between two nodes is slow, whose network that is, and that nobody else is accused."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.agent.links import COPIES, LEAST_BYTES, LinkTimes
from orchestrator.core.incident import Cause, Incident
from orchestrator.core.ways import IN_A_ROW, SLOW_TIMES
from orchestrator.protocol.ids import Generation, NodeId
from orchestrator.protocol.messages import LinkTimed
from tests import runfiles
from tests.conftest import Cluster

NODES = 6
USUAL = 1e9
RING = [(f"node-{n}", f"node-{(n + 1) % NODES}") for n in range(NODES)]


def ring() -> Cluster:
    cluster = Cluster(
        runfiles.text(
            nodes={"count": NODES, "ranksPerNode": 1, "spares": 0},
            parallelism={"dpReplicate": 1, "dpShard": NODES},
        )
    )
    cluster.begin([f"node-{n}" for n in range(NODES)])
    cluster.train(3)
    return cluster


def hear(cluster: Cluster, rates: dict[tuple[str, str], float], rounds: int = IN_A_ROW) -> None:
    """Each node tells in each round how fast its way is, `USUAL` unless it is in `rates`."""
    for _ in range(rounds):
        for way in RING:
            fact = LinkTimed(
                generation=cluster.state.generation,
                to=NodeId(way[1]),
                bytes_per_s=rates.get(way, USUAL),
                copies=COPIES,
            )
            cluster.say(way[0], fact)
        cluster.train(1)


def told(cluster: Cluster) -> list[Incident]:
    return [each for each in cluster.state.incidents if each.kind == "slow-link"]


def test_one_slow_way_is_told_once_with_both_ends_and_nobody_loses_a_seat() -> None:
    cluster = ring()
    hear(cluster, {RING[2]: USUAL / 8}, rounds=10)

    (incident,) = told(cluster)
    assert incident.nodes == ("node-2", "node-3")
    assert incident.cause is Cause.NETWORK
    assert "8.0 times as slowly" in incident.findings[0].evidence
    assert "what lies between them" in incident.findings[0].evidence
    assert incident.rung == "none"
    assert incident.resumed_at == incident.detected_at
    assert cluster.state.generation == 1


def test_both_ways_of_a_node_are_its_own_network() -> None:
    cluster = ring()
    hear(cluster, {RING[2]: USUAL / 4, RING[3]: USUAL / 5}, rounds=10)

    (incident,) = told(cluster)
    assert incident.nodes == ("node-3",)
    assert "the network of node-3" in incident.findings[0].evidence


def test_what_is_slow_now_and_then_or_not_much_or_everywhere_is_nobodys_fault() -> None:
    cluster = ring()
    for _ in range(5):
        hear(cluster, {RING[1]: USUAL / 50}, rounds=IN_A_ROW - 1)
        hear(cluster, {}, rounds=1)
    hear(cluster, {RING[1]: USUAL / (0.9 * SLOW_TIMES)}, rounds=10)
    hear(cluster, dict.fromkeys(RING, USUAL / 100), rounds=10)

    assert told(cluster) == []


def test_a_rate_that_can_not_be_and_a_node_that_nobody_knows_switch_nothing_off() -> None:
    cluster = ring()
    hear(cluster, {}, rounds=1)
    for to, rate in (("node-3", 0.0), ("node-3", -1.0), ("node-99", 1.0)):
        for _ in range(IN_A_ROW):
            fact = LinkTimed(
                generation=cluster.state.generation,
                to=NodeId(to),
                bytes_per_s=rate,
                copies=COPIES,
            )
            cluster.say("node-2", fact)

    assert told(cluster) == []
    assert cluster.controller.disabled == {}
    hear(cluster, {RING[2]: USUAL / 8})
    assert len(told(cluster)) == 1


def test_a_new_generation_begins_to_count_anew_and_words_of_the_old_one_say_nothing() -> None:
    cluster = ring()
    hear(cluster, {RING[2]: USUAL / 8}, rounds=IN_A_ROW - 1)
    cluster.hold(5)
    cluster.exit(0)
    cluster.resume()
    cluster.train(1)
    hear(cluster, {}, rounds=1)
    late = LinkTimed(generation=Generation(1), to=NodeId("node-3"), bytes_per_s=1.0, copies=COPIES)
    cluster.say("node-2", late)
    hear(cluster, {RING[2]: USUAL / 8}, rounds=IN_A_ROW - 1)
    assert told(cluster) == []

    hear(cluster, {RING[2]: USUAL / 8}, rounds=1)

    assert len(told(cluster)) == 1


@given(
    noise=st.lists(st.floats(1.0, SLOW_TIMES**0.49), min_size=NODES, max_size=NODES),
    rounds=st.integers(1, 6),
)
def test_nodes_that_differ_by_less_than_the_limit_are_never_told(
    noise: list[float], rounds: int
) -> None:
    cluster = ring()
    hear(cluster, {way: USUAL * each for way, each in zip(RING, noise, strict=True)}, rounds)

    assert told(cluster) == []


def test_an_agent_tells_the_median_of_a_few_copies_that_are_large_enough() -> None:
    said: list[LinkTimed] = []
    times = LinkTimes(said.append)
    for seconds in itertools.islice(itertools.cycle([1.0, 2.0, 2.0, 40.0]), 2 * COPIES):
        times.copied(Generation(3), NodeId("b"), 2 * LEAST_BYTES, seconds)
        times.copied(Generation(3), NodeId("b"), LEAST_BYTES - 1, 1e-6)

    assert [(each.generation, each.to, each.copies) for each in said] == [(3, "b", COPIES)] * 2
    assert all(each.bytes_per_s == pytest.approx(LEAST_BYTES) for each in said)


def test_what_was_measured_on_another_way_is_not_counted_for_this_one() -> None:
    said: list[LinkTimed] = []
    times = LinkTimes(said.append)
    for _ in range(COPIES - 1):
        times.copied(Generation(3), NodeId("b"), LEAST_BYTES, 1.0)
    for _ in range(COPIES):
        times.copied(Generation(4), NodeId("c"), LEAST_BYTES, 2.0)

    assert [(each.generation, each.to) for each in said] == [(4, "c")]
