"""Which nodes are retired, and what becomes of them."""

from math import exp
from typing import Any

import pytest

from orchestrator.core.events import ControllerStarted, DrainCancelled, DrainRequested
from orchestrator.core.phases import RunPhase
from orchestrator.policy import lemons
from orchestrator.policy.arithmetic import DAY_S
from orchestrator.policy.lemons import LIMIT, failures, retired
from orchestrator.policy.switches import LEMON_RETIREMENT
from orchestrator.protocol.ids import NodeId
from tests import runfiles
from tests.conftest import Cluster
from tests.journals import assert_seated_last, holdfast, write

LEMON = NodeId("node-1")


def fail(cluster: Any, node: str, times: int) -> None:
    """Have a node be lost and come back, again and again, while there is no other."""
    for _ in range(times):
        known = cluster.state.nodes[NodeId(node)]
        cluster.after(0.1).lose(node)
        cluster.after(0.1).join(node, incarnation=known.incarnation + 1)
        cluster.go_on()


def begun(text: str | None = None) -> Any:
    """A cluster that trains, whose spare is gone."""
    cluster: Any = Cluster() if text is None else Cluster(text)
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    cluster.lose("node-2")
    return cluster


def with_spare(cluster: Any) -> Any:
    incarnation = cluster.state.nodes[NodeId("node-2")].incarnation + 1
    cluster.after(0.1).join("node-2", incarnation=incarnation)
    return cluster


def test_a_sound_node_is_hardly_ever_retired_and_a_lemon_mostly() -> None:
    def at_least(mean: float) -> float:
        masses = [exp(-mean)]
        for k in range(1, LIMIT):
            masses.append(masses[-1] * mean / k)
        return 1 - sum(masses)

    mean = lemons.FAILURES_PER_NODE_DAY * lemons.WINDOW_DAYS
    sound, lemon = 0.988 * at_least(mean), 0.012 * at_least(20 * mean)

    assert LIMIT == 3
    assert at_least(mean) <= 1 - lemons.SOUND
    assert lemon / (lemon + sound) == pytest.approx(0.96, abs=0.005)


def test_a_node_that_failed_too_often_is_replaced_when_a_spare_is_free_and_a_restart_is_due() -> (
    None
):
    cluster = begun()
    fail(cluster, LEMON, LIMIT)
    assert retired(cluster.state) == {LEMON}
    with_spare(cluster)
    cluster.train(1)
    assert cluster.seated() == ("node-0", "node-1")

    cluster.after(0.1).exit(0, step=cluster.state.reached_step)

    assert cluster.seated() == ("node-0", "node-2")
    reason = cluster.state.incidents[-1].reason
    assert "node-2 in place of node-1 (retired: 3 failures in 28 days, limit 3)" in reason


def test_one_failure_less_is_what_a_sound_node_may_have() -> None:
    cluster = begun()
    fail(cluster, LEMON, LIMIT - 1)
    with_spare(cluster)

    cluster.after(0.1).exit(0, step=cluster.state.reached_step)

    assert retired(cluster.state) == frozenset()
    assert cluster.seated() == ("node-0", "node-1")


def test_a_retired_node_gets_a_seat_only_if_there_is_no_other() -> None:
    cluster = begun()
    fail(cluster, LEMON, LIMIT)
    with_spare(cluster)
    cluster.after(0.1).exit(0, step=cluster.state.reached_step)
    cluster.go_on()

    assert_seated_last(cluster, "node-1")

    assert "node-1 (retired: " in cluster.state.incidents[-1].reason


def test_failures_count_for_a_window_and_no_longer() -> None:
    cluster = begun()
    fail(cluster, LEMON, 1)
    cluster.after((lemons.WINDOW_DAYS - 1) * DAY_S).tick()
    cluster.go_on()
    fail(cluster, LEMON, LIMIT - 1)
    assert retired(cluster.state) == {LEMON}

    cluster.after(2 * DAY_S).tick()

    assert failures(cluster.state, LEMON) == LIMIT - 1
    assert retired(cluster.state) == frozenset()


def test_nodes_that_fail_together_are_no_lemons() -> None:
    cluster = begun()
    for incarnation in range(2, LIMIT + 3):
        cluster.after(0.1).lose("node-0")
        cluster.after(0.1).lose("node-1")
        for node in ("node-0", "node-1"):
            cluster.after(0.1).join(node, incarnation=incarnation)
        if cluster.state.phase is RunPhase.SEARCHING:
            cluster.found()
        cluster.go_on()

    assert len([i for i in cluster.state.incidents if i.kind == "node-lost"]) > LIMIT
    assert retired(cluster.state) == frozenset()


def test_a_node_that_was_to_be_free_and_is_taken_has_not_failed() -> None:
    cluster = begun()
    for _ in range(LIMIT):
        cluster.tell(DrainRequested(at=cluster.at(), nodes=(LEMON,), by="ann", within_s=1))
        known = cluster.state.nodes[LEMON]
        cluster.after(0.1).lose(LEMON)
        cluster.after(0.1).join(LEMON, incarnation=known.incarnation + 1)
        cluster.tell(DrainCancelled(at=cluster.at(), nodes=(LEMON,), by="ann"))
        cluster.go_on()

    assert len(cluster.state.incidents) == LIMIT
    assert retired(cluster.state) == frozenset()


def test_a_node_that_ended_while_no_controller_was_there_is_not_blamed() -> None:
    cluster = begun()
    for round_ in range(LIMIT):
        known = cluster.state.nodes[LEMON]
        cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=round_ + 2))
        generation = cluster.state.generation
        cluster.join("node-0", generation=generation, mark=5)
        cluster.join(LEMON, incarnation=known.incarnation + 1)
        cluster.go_on()

    assert [i.kind for i in cluster.state.incidents].count("node-lost") == LIMIT
    assert retired(cluster.state) == frozenset()


def test_the_jobs_own_crashes_are_nobodys_failures() -> None:
    cluster = begun()
    for step in range(LIMIT + 1):
        cluster.after(0.1).exit(2, 1, step=cluster.state.reached_step, kind=f"Error{step}")
        cluster.go_on()
    for _ in range(LIMIT + 1):
        cluster.after(0.1).exit(2, step=cluster.state.reached_step)
        cluster.go_on()

    assert retired(cluster.state) == frozenset()


def test_a_crash_that_comes_again_on_one_node_and_nowhere_else_counts_as_its_failure() -> None:
    cluster = begun()
    fail(cluster, LEMON, LIMIT - 2)
    step = cluster.state.reached_step
    cluster.after(0.1).exit(2, -11, step=step)
    assert failures(cluster.state, LEMON) == LIMIT - 2
    cluster.resume()

    cluster.after(0.1).exit(2, -11, step=step)

    assert failures(cluster.state, LEMON) == LIMIT
    assert retired(cluster.state) == {LEMON}


def test_without_the_policy_a_lemon_is_a_spare_like_any_other() -> None:
    text = runfiles.text(trainer={"steps": 1000}, recovery={"disable": [LEMON_RETIREMENT]})
    cluster = begun(text)
    fail(cluster, LEMON, LIMIT)
    with_spare(cluster)

    cluster.after(0.1).exit(0, step=cluster.state.reached_step)

    assert failures(cluster.state, LEMON) == LIMIT
    assert retired(cluster.state) == frozenset()
    assert cluster.seated() == ("node-0", "node-1")


def test_a_retired_node_is_shown_as_such_with_the_reason(tmp_path: Any) -> None:
    cluster = begun()
    fail(cluster, LEMON, LIMIT)
    with_spare(cluster)
    cluster.after(0.1).exit(0, step=cluster.state.reached_step)
    cluster.go_on()
    folder = write(cluster, tmp_path / "demo")

    listed = holdfast("get", "nodes", "-o", "wide", "--run", str(folder.root)).stdout
    described = holdfast("describe", "node", LEMON, "--run", str(folder.root)).stdout

    (line,) = [row for row in listed.splitlines() if row.startswith(LEMON)]
    assert "Retired" in line
    assert "retired: 3 failures in 28 days, limit 3" in line
    assert "Retired" in described
    assert described.count("node-1 ended") >= LIMIT
