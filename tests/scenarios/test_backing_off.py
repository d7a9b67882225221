"""Restarts that bring no new step come after ever longer pauses, whatever it is that strikes."""

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.core.decisions import StartGeneration
from orchestrator.core.ledger import Bucket
from orchestrator.core.phases import RunPhase
from tests.conftest import RUN, Cluster

Fault = Callable[[Cluster], list[Any]]


def kill(cluster: Cluster) -> list[Any]:
    """SIGKILL: nothing in it tells one from another."""
    return cluster.exit(1, step=cluster.state.reached_step)


def raise_anew(cluster: Cluster) -> list[Any]:
    """Another exception each time."""
    kind = f"Error{cluster.state.generation}"
    return cluster.exit(1, 1, step=cluster.state.reached_step, kind=kind)


def paused_s(cluster: Cluster, decisions: list[Any]) -> float:
    """Let time pass until a generation is ordered, and it trains; return how long it took."""
    begun = cluster.now
    while not any(isinstance(d, StartGeneration) for d in decisions):
        assert cluster.state.phase is RunPhase.BACKING_OFF
        assert cluster.now < begun + 100
        decisions = cluster.after(0.5).beat(step=cluster.state.reached_step)
    waited_s = cluster.now - begun
    cluster.resume()
    return round(waited_s, 3)


@pytest.mark.parametrize(("fault", "count"), [(kill, 9), (raise_anew, 8)])
def test_pauses_double_up_to_the_longest_while_restarts_bring_no_new_step(
    cluster: Cluster, fault: Fault, count: int
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)

    pauses = [paused_s(cluster, fault(cluster)) for _ in range(count)]

    assert pauses == [0, 1, 2, 4, 8, 16, 32, 60, 60][:count]
    spent_us = cluster.state.ledger.totals()[Bucket.BACKOFF]
    assert spent_us == pytest.approx(sum(pauses) * 1e6, abs=1e4)


def test_a_new_step_makes_the_next_restart_free_again(cluster: Cluster) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    assert [paused_s(cluster, kill(cluster)) for _ in range(3)] == [0, 1, 2]

    cluster.train(1)

    assert [paused_s(cluster, kill(cluster)) for _ in range(2)] == [0, 1]


def test_steps_that_are_only_done_again_are_no_progress(cluster: Cluster) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    cluster.train(4)
    assert paused_s(cluster, kill(cluster)) == 0
    cluster.train(4)

    assert paused_s(cluster, kill(cluster)) == 1


def test_a_second_fault_during_a_pause_does_not_begin_it_anew(cluster: Cluster) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    assert [paused_s(cluster, kill(cluster)) for _ in range(4)] == [0, 1, 2, 4]
    kill(cluster)
    cluster.after(6).beat(step=5)

    decisions = cluster.lose("node-1")

    assert paused_s(cluster, decisions) == 2


def test_the_pauses_are_those_of_the_run_file(cluster_of: Callable[[str], Cluster]) -> None:
    cluster = cluster_of(f"{RUN}  recovery: {{backoff: 3s, backoffMax: 10s}}\n")
    cluster.start()
    cluster.train(5)

    assert [paused_s(cluster, kill(cluster)) for _ in range(5)] == [0, 3, 6, 10, 10]


def test_a_pause_says_why_and_how_long(cluster: Cluster) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    for _ in range(2):
        paused_s(cluster, kill(cluster))

    (wake,) = kill(cluster)

    assert wake.reason == (
        "2 restarts in a row brought no new step; pausing 2 s before the next one"
    )


def test_a_restart_that_is_struck_before_it_trains_brought_no_new_step_either(
    cluster: Cluster,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    kill(cluster)
    cluster.after(0.05).reach("cleared")

    assert paused_s(cluster, kill(cluster)) == 1
