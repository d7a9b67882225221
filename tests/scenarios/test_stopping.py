"""When a run is ended rather than begun once more, and what it says of that."""

from collections.abc import Callable
from typing import Any

from orchestrator.core.events import StopRequested
from orchestrator.core.phases import RunPhase
from tests import runfiles
from tests.orders import ended, started


def test_the_same_exception_at_the_same_step_on_two_nodes_stops_the_run_with_its_traceback(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.exit(0, 1, step=5, kind="ValueError")
    cluster.resume()

    order = ended(cluster.exit(2, 1, step=5, kind="ValueError"))

    assert order.state == "Failed"
    assert "ValueError" in order.reason
    assert 'File "a.py", line 1' in order.reason
    assert cluster.state.phase is RunPhase.FAILED


def test_the_same_exception_three_times_on_the_only_node_there_is_does_not_claim_to_have_moved(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.lose("node-2")
    cluster.train(5)
    cluster.exit(0, 1, step=5, kind="ValueError")
    cluster.resume()
    cluster.exit(0, 1, step=5, kind="ValueError")
    started(cluster.rest())
    cluster.resume()

    reason = ended(cluster.exit(0, 1, step=5, kind="ValueError")).reason

    assert "in 3 generations on node-0; no other node was free to try it on" in reason
    assert "moves" not in reason


def test_a_fault_that_strikes_one_node_twice_is_tried_on_a_spare(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    cluster.exit(0, 1, step=5, kind="ValueError")
    cluster.resume()
    cluster.exit(0, 1, step=5, kind="ValueError")
    assert cluster.state.phase is RunPhase.BACKING_OFF

    order = started(cluster.after(1.5).tick())

    assert order.seats[:2] == ("node-2", "node-2")


def test_kills_from_outside_at_the_same_step_are_not_taken_for_a_poison_step(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    started(cluster.exit(0, -9, step=5))
    cluster.resume()
    for rank in (2, 1):
        cluster.exit(rank, -9, step=5)
        started(cluster.rest())
        cluster.resume()

    assert cluster.state.end_state == ""


def test_a_spent_budget_ends_the_run_and_says_which(cluster_of: Callable[..., Any]) -> None:
    text = runfiles.text(recovery={"hardwareBudget": 2})
    cluster = cluster_of(text)
    cluster.start()
    started(cluster.after(0.1).exit(1))
    cluster.resume()
    cluster.after(0.1).exit(1)
    started(cluster.rest())
    cluster.resume()

    order = ended(cluster.after(0.1).exit(1))

    assert "hardware budget spent: 2 restarts, limit 2" in order.reason


def test_progress_refills_the_budget(cluster: Any) -> None:
    cluster.start()
    cluster.exit(1)
    cluster.resume()
    assert cluster.state.budgets["hardware"].spent == 1

    cluster.train(250)

    assert cluster.state.budgets["hardware"].spent == 0


def test_a_stop_ends_the_run_and_names_who_asked(cluster: Any) -> None:
    cluster.start()

    order = ended(cluster.tell(StopRequested(at=cluster.at(), by="holdfast stop")))

    assert order.state == "Stopped"
    assert cluster.tick() == []


def test_two_nodes_that_abort_at_the_same_step_are_no_bug_of_the_job(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    cluster.exit(0, -6, step=10)
    cluster.resume()

    decisions = [*cluster.after(0.1).exit(2, -6, step=10), *cluster.rest()]

    assert started(decisions).generation == 3


def test_an_abort_that_comes_a_third_time_at_the_same_step_ends_the_run(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    for rank in (0, 2):
        cluster.exit(rank, -6, step=10)
        if cluster.state.pause_until is not None:
            cluster.rest()
        cluster.resume()

    order = ended(cluster.after(0.1).exit(0, -6, step=10))

    assert "moves with the job" in order.reason
