"""Nodes that are slow at the same time: what each costs depends on who else is slow."""

from typing import Any

import pytest

from orchestrator.core.decisions import ProbeRanks
from orchestrator.policy import stragglers
from orchestrator.protocol.ids import NodeId, Rank
from tests import runfiles
from tests.scenarios.test_stragglers import answer, starts, train_all

ONE, OTHER = Rank(2), Rank(5)
NODE, BESIDE = NodeId("node-2"), NodeId("node-5")


@pytest.fixture
def eight(cluster_of: Any) -> Any:
    """Eight nodes of a rank each, and two spares."""
    cluster = cluster_of(
        runfiles.text(
            nodes={"count": 8, "ranksPerNode": 1, "spares": 2},
            parallelism={"dpReplicate": 4, "dpShard": 2},
            trainer={"steps": 5000},
        )
    )
    cluster.begin([f"node-{number}" for number in range(10)])
    cluster.resume()
    train_all(cluster, 12, {})
    return cluster


def measure(cluster: Any, times: dict[Rank, float]) -> None:
    """Take steps until whoever is slow was found and measured, and answer as it is."""
    for _ in range(3):
        train_all(cluster, 12, times)
        for order in [d for d in cluster.decisions if isinstance(d, ProbeRanks)]:
            answer(cluster, order, times[order.ranks[0]])
    found = cluster.state.slow.values()
    assert {slow.rank for slow in found if slow.verdict == "hardware"} >= set(times)


def go_on(cluster: Any, times: dict[Rank, float], rounds: int = 20) -> None:
    before = len(starts(cluster))
    for _ in range(rounds):
        train_all(cluster, 10, times)
        cluster.hold(cluster.state.reached_step)
        if len(starts(cluster)) > before:
            return


def test_two_that_are_as_slow_as_each_other_are_swapped_in_one_restart(eight: Any) -> None:
    times = {ONE: 1.2, OTHER: 1.2}
    measure(eight, times)
    go_on(eight, times)

    order = starts(eight)[-1]
    assert len(starts(eight)) == 2
    assert {NODE, BESIDE}.isdisjoint(order.seats)
    assert f"to keep it and {BESIDE} costs 1" in order.reason


def test_one_of_two_that_are_as_slow_as_each_other_is_not_swapped_alone(eight: Any) -> None:
    times = {ONE: 1.2, OTHER: 1.2}
    eight.lose("node-9")
    measure(eight, times)
    go_on(eight, times)

    assert len(starts(eight)) == 1
    assert "waiting for 2 spares that are not slow" in stragglers.standing(eight.state, NODE)


def test_one_that_is_less_slow_costs_what_is_gained_once_the_slower_one_is_gone_as_well(
    eight: Any,
) -> None:
    for spare in ("node-8", "node-9"):
        eight.lose(spare)
    measure(eight, {ONE: 2.0})
    measure(eight, {ONE: 2.0, OTHER: 1.2})
    slower, other = stragglers.groups(eight.state)
    assert [slow.node for slow in slower.slows + other.slows] == [NODE, BESIDE]
    assert (slower.share, other.share) == (pytest.approx(0.64), pytest.approx(0.15, abs=0.01))
    assert slower.pays
    assert not other.pays

    eight.join("node-8", incarnation=2)
    go_on(eight, {ONE: 2.0, OTHER: 1.2})
    assert NODE not in starts(eight)[-1].seats
    assert BESIDE in starts(eight)[-1].seats
    eight.resume()
    eight.join("node-9", incarnation=2)
    go_on(eight, {OTHER: 1.2})

    assert BESIDE not in starts(eight)[-1].seats
