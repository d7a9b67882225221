"""How long ranks may save or evaluate, once it was seen how long that takes on this run."""

from typing import Any

import pytest

from orchestrator.core import snapshot
from orchestrator.core.decisions import Decision, StartGeneration
from orchestrator.protocol.phases import RankPhase
from tests.conftest import Cluster

CHECKPOINT, EVALUATING, WARMING = RankPhase.CHECKPOINT, RankPhase.EVALUATING, RankPhase.WARMING


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    made.start()
    made.train(20)
    return made


def stand_still(cluster: Cluster, phase: RankPhase, seconds: float) -> list[Decision]:
    """Rank 1 is in a phase for so long, and all others wait for it; return what is decided."""
    step, until = cluster.state.reached_step, cluster.now + seconds
    while cluster.now < until:
        cluster.after(0.5)
        if found := cluster.beat(step=step, moving=lambda _: False, phases={1: phase}):
            return found
    return []


def go_through(cluster: Cluster, phase: RankPhase, seconds: float, *, times: int = 5) -> None:
    for _ in range(times):
        assert stand_still(cluster, phase, seconds) == []
        cluster.train(2)


@pytest.mark.parametrize("phase", [CHECKPOINT, EVALUATING])
def test_a_rank_that_stays_in_a_phase_far_longer_than_ever_hangs_there(
    cluster: Cluster, phase: RankPhase
) -> None:
    go_through(cluster, phase, 3.0)
    begun = cluster.now

    decisions = stand_still(cluster, phase, 60.0)

    (order,) = [d for d in decisions if isinstance(d, StartGeneration)]
    assert order.dismiss == (1,)
    assert 15.0 <= cluster.now - begun <= 16.0, "five times as long"
    words = cluster.state.incidents[-1].findings[0].evidence
    assert f"{phase.name.lower()} may take 15.0 s" in words


def test_what_was_always_short_may_take_ten_seconds_all_the_same(cluster: Cluster) -> None:
    go_through(cluster, EVALUATING, 0.5)

    assert stand_still(cluster, EVALUATING, 9.5) == []
    assert stand_still(cluster, EVALUATING, 2.0) != []


def test_what_was_not_seen_often_has_the_limit_of_the_run_file(cluster: Cluster) -> None:
    go_through(cluster, CHECKPOINT, 2.0, times=4)

    assert stand_still(cluster, CHECKPOINT, 300.0) == []


def test_compiling_may_take_its_time_however_short_it_was_before(cluster: Cluster) -> None:
    go_through(cluster, WARMING, 1.0, times=9)
    go_through(cluster, CHECKPOINT, 1.0, times=9)

    assert stand_still(cluster, WARMING, 300.0) == []


def test_what_a_generation_does_for_the_first_time_may_take_its_time(cluster: Cluster) -> None:
    go_through(cluster, EVALUATING, 2.0)
    cluster.hold(cluster.state.reached_step)
    cluster.exit(3, step=cluster.state.reached_step)
    cluster.go_on()

    assert stand_still(cluster, EVALUATING, 100.0) == []
    cluster.train(1)
    assert stand_still(cluster, EVALUATING, 200.0) == [], "that is how long it may take now"


def test_a_phase_that_was_broken_off_may_take_longer_than_that_the_next_time(
    cluster: Cluster,
) -> None:
    go_through(cluster, CHECKPOINT, 1.0)
    cluster.hold(cluster.state.reached_step)
    assert stand_still(cluster, CHECKPOINT, 60.0) != []
    cluster.go_on()
    go_through(cluster, CHECKPOINT, 1.0, times=1)

    assert stand_still(cluster, CHECKPOINT, 45.0) == []


def test_what_nobody_saw_is_not_held_against_a_rank(cluster: Cluster) -> None:
    go_through(cluster, CHECKPOINT, 1.0)
    stand_still(cluster, CHECKPOINT, 5.0)

    cluster.after(500.0)  # a laptop that was shut
    step = cluster.state.reached_step
    assert cluster.beat(step=step, moving=lambda _: False, phases={1: CHECKPOINT}) == []


def test_limits_are_part_of_what_a_successor_goes_on_from(cluster: Cluster) -> None:
    go_through(cluster, CHECKPOINT, 3.0)
    successor = Cluster()
    successor.now, successor.progress = cluster.now, cluster.progress
    successor.controller = restored(cluster, successor)

    for each in (cluster, successor):
        begun: Any = each.now
        assert stand_still(each, CHECKPOINT, 60.0) != []
        assert each.now - begun <= 16.0


def restored(cluster: Cluster, fresh: Cluster) -> Any:
    return snapshot.restore(snapshot.take(cluster.controller), fresh.controller)
