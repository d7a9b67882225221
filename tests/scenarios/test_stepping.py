"""How long ranks may stand still within a step, once it was seen how long they do in each phase."""

from typing import Any

import pytest

from orchestrator.core import snapshot
from orchestrator.core.decisions import Decision, StartGeneration
from orchestrator.protocol.phases import RankPhase
from tests.conftest import Cluster

FORWARD, OPTIMIZER, WARMING = RankPhase.FORWARD, RankPhase.OPTIMIZER, RankPhase.WARMING
HANG_S = 6.0
STEP_S = 4.0


def beat(cluster: Cluster, phase: RankPhase, *, moves: bool, report: bool = False) -> Any:
    step = cluster.state.reached_step + report
    world = range(len(cluster.state.seats))
    return cluster.beat(
        step=step, moving=lambda _: moves, phases=dict.fromkeys(world, phase), report=report,
        seconds=STEP_S,
    )  # fmt: skip


def train(cluster: Cluster, steps: int, *, optimizer_s: float = 0.5) -> None:
    """Take steps of 4 s: nothing is heard for most of the forward pass."""
    for _ in range(steps):
        for phase, seconds in ((FORWARD, STEP_S - optimizer_s), (OPTIMIZER, optimizer_s)):
            beat(cluster.after(0.01), phase, moves=True)
            ticks = int(seconds / 0.5)
            for _ in range(ticks):
                assert beat(cluster.after(0.5), phase, moves=False) == []
        beat(cluster.after(0.01), FORWARD, moves=True, report=True)


def until_noticed(cluster: Cluster, phase: RankPhase, most_s: float = 60.0) -> float:
    """Stand still in a phase; return for how long that went unnoticed."""
    beat(cluster.after(0.01), phase, moves=True)
    begun = cluster.now
    while cluster.now < begun + most_s:
        found: list[Decision] = beat(cluster.after(0.1), phase, moves=False)
        if any(isinstance(each, StartGeneration) for each in found):
            return cluster.now - begun
    return most_s


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    made.start()
    made.hold(0)
    return made


def successor(cluster: Cluster) -> Cluster:
    """Return one that goes on from what this one knows."""
    made = Cluster()
    made.now, made.progress = cluster.now, cluster.progress
    made.controller = snapshot.restore(snapshot.take(cluster.controller), made.controller)
    return made


def evidence(cluster: Cluster) -> str:
    return cluster.state.incidents[-1].findings[0].evidence


def test_a_short_phase_has_one_step_of_time_and_a_long_one_two(cluster: Cluster) -> None:
    train(cluster, 60)
    other = successor(cluster)

    assert until_noticed(cluster, OPTIMIZER) == pytest.approx(HANG_S + STEP_S, abs=0.2)
    assert until_noticed(other, FORWARD) == pytest.approx(HANG_S + 2 * STEP_S, abs=0.2)


def test_it_is_said_from_what_a_limit_was_learned(cluster: Cluster) -> None:
    train(cluster, 60)
    until_noticed(cluster, OPTIMIZER)

    assert (
        "limit 10.0 s (6 s + 4.00 s, learned: optimizer stood still for 0.50 s at most (p99.9 of "
        in evidence(cluster)
    )


def test_what_was_not_seen_often_is_bounded_by_what_steps_take(cluster: Cluster) -> None:
    train(cluster, 20)

    assert until_noticed(cluster, OPTIMIZER) == pytest.approx(HANG_S + 2 * STEP_S, abs=0.2)
    assert "limit 14.0 s (6 s + 2 x p99 step 4.00 s, learned from 19 steps)" in evidence(cluster)


def test_a_phase_that_took_long_once_has_the_time_for_it_again(cluster: Cluster) -> None:
    train(cluster, 60)
    train(cluster, 1, optimizer_s=3.5)

    assert until_noticed(cluster, OPTIMIZER) > HANG_S + STEP_S + 2


def test_nobody_is_accused_while_it_compiles_or_after_a_laptop_was_shut(cluster: Cluster) -> None:
    train(cluster, 60)

    assert until_noticed(cluster, WARMING, most_s=100.0) == 100.0
    beat(cluster.after(0.1), OPTIMIZER, moves=True)
    cluster.after(500.0)
    assert until_noticed(cluster, OPTIMIZER, most_s=5.0) == 5.0


def test_a_successor_goes_on_with_what_was_learned(cluster: Cluster) -> None:
    train(cluster, 60)
    successor = Cluster()
    successor.now, successor.progress = cluster.now, cluster.progress
    successor.controller = snapshot.restore(snapshot.take(cluster.controller), successor.controller)

    assert until_noticed(successor, OPTIMIZER) == until_noticed(cluster, OPTIMIZER)
