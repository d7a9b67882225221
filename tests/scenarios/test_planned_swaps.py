"""What happens to nodes that are to be free, told as it happens."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from orchestrator.core.decisions import StartGeneration, WakeAt
from orchestrator.core.events import ControllerStarted, DrainCancelled, DrainRequested
from orchestrator.core.incident import Cause
from orchestrator.core.phases import RunPhase
from orchestrator.core.report import report
from orchestrator.policy import moments, planned
from orchestrator.policy.switches import PLANNED_SWAP
from orchestrator.protocol.ids import NodeId
from tests import runfiles

STEP_S = 0.1
"""What a step takes in `Cluster.train`."""


def drain(cluster: Any, *nodes: str, within_s: float | None = None) -> list[Any]:
    asked = DrainRequested(
        at=cluster.at(), nodes=tuple(map(NodeId, nodes)), by="ann", reason="DIMM", within_s=within_s
    )
    return list(cluster.tell(asked))


def uncordon(cluster: Any, *nodes: str) -> list[Any]:
    asked = DrainCancelled(at=cluster.at(), nodes=tuple(map(NodeId, nodes)), by="ann")
    return list(cluster.tell(asked))


def starts(cluster: Any) -> list[StartGeneration]:
    return [d for d in cluster.decisions if isinstance(d, StartGeneration)]


def training(cluster: Any, steps: int = 12) -> Any:
    """Train; memory has a step that is two behind."""
    cluster.start()
    cluster.train(steps - 2)
    cluster.hold(steps - 2)
    cluster.train(2)
    cluster.after(5 * STEP_S).beat(step=steps)
    return cluster


def test_a_node_is_swapped_at_the_moment_at_which_memory_comes_to_have_a_newer_step(
    cluster: Any,
) -> None:
    training(cluster)
    drain(cluster, "node-0")
    cluster.train(3)
    assert len(starts(cluster)) == 1

    cluster.hold(15)

    order = starts(cluster)[-1]
    assert order.seats == ("node-2", "node-2", "node-1", "node-1")
    assert order.restore is not None
    assert order.restore.step == 15
    assert order.dismiss == ()
    assert "planned swap, node-2 in place of node-0 from step 15, 0 steps to do again" in (
        order.reason
    )
    assert "asked for by ann: DIMM" in order.reason


def test_what_is_planned_costs_no_budget_and_no_back_off_and_is_no_false_alarm(
    cluster: Any,
) -> None:
    training(cluster)
    drain(cluster, "node-0")
    cluster.train(1)
    cluster.hold(13)
    cluster.resume()

    assert {b.spent for b in cluster.state.budgets.values()} == {0}
    assert cluster.state.futile_restarts == 0
    (incident,) = report(cluster.state).incidents
    assert (incident.kind, incident.rung, incident.lost_steps) == ("planned", "planned swap", 0)
    assert not incident.false_alarm
    assert sum(incident.ledger.values()) > 0
    # A crash right after it is the first that brings no new step: no pause before it either.
    cluster.after(0.1).exit(1, step=13)
    assert starts(cluster)[-1].generation == 3


def test_a_drained_node_gets_no_seat_until_it_is_uncordoned(cluster: Any) -> None:
    training(cluster)
    drain(cluster, "node-0")
    cluster.train(1)
    cluster.hold(13)
    cluster.resume()
    cluster.hold(13)
    cluster.join("node-0", incarnation=2)

    cluster.after(0.1).lose("node-1")
    assert cluster.state.phase is RunPhase.GATHERING

    uncordon(cluster, "node-0")
    assert starts(cluster)[-1].seats == ("node-2", "node-2", "node-0", "node-0")


def test_a_run_that_ends_for_want_of_a_node_names_those_that_are_cordoned(cluster: Any) -> None:
    training(cluster)
    drain(cluster, "node-2")
    cluster.after(0.1).lose("node-1")

    for _ in range(100):
        if cluster.state.phase.final:
            break
        cluster.after(1).beat(step=12, heard=("node-0", "node-2"))

    assert "needs 2 nodes and has 1, 0 of 1 spares free" in cluster.state.end_reason
    assert "cordoned: node-2" in cluster.state.end_reason


def test_a_node_waits_for_a_spare_and_is_swapped_once_there_is_one(cluster: Any) -> None:
    training(cluster)
    cluster.lose("node-2")
    drain(cluster, "node-0")
    cluster.train(1)
    cluster.hold(13)
    assert len(starts(cluster)) == 1
    assert "waiting for a spare: 0 free" in planned.standing(cluster.state, NodeId("node-0"))

    cluster.join("node-2", incarnation=2)
    cluster.train(1)
    cluster.hold(14)

    assert starts(cluster)[-1].seats == ("node-2", "node-2", "node-1", "node-1")


def test_a_drain_that_was_cancelled_moves_nothing_when_a_spare_comes(cluster: Any) -> None:
    training(cluster)
    cluster.lose("node-2")
    drain(cluster, "node-0")
    uncordon(cluster, "node-0")

    cluster.join("node-2", incarnation=2)
    cluster.train(1)
    cluster.hold(13)

    assert len(starts(cluster)) == 1
    assert planned.standing(cluster.state, NodeId("node-0")) == ""


def test_of_two_nodes_and_one_spare_the_one_whose_time_is_up_first_is_swapped(
    cluster: Any,
) -> None:
    training(cluster)
    drain(cluster, "node-0")
    drain(cluster, "node-1", within_s=600)
    cluster.train(1)
    cluster.hold(13)

    assert starts(cluster)[-1].seats == ("node-0", "node-0", "node-2", "node-2")


def test_a_node_whose_time_is_nearly_up_is_not_kept_waiting_for_memory(cluster: Any) -> None:
    training(cluster)
    # The limit is 10 s: detectWithin.
    drain(cluster, "node-0", within_s=14)
    cluster.after(3.9).beat(step=12)
    assert len(starts(cluster)) == 1

    cluster.after(0.2).beat(step=12)

    order = starts(cluster)[-1]
    assert order.restore is not None
    assert order.restore.step == 10
    assert "9.9 s are left" in order.reason


def test_the_controller_asks_to_be_woken_for_a_deadline_and_so_does_its_successor(
    cluster: Any,
) -> None:
    training(cluster)
    wakes = [d for d in drain(cluster, "node-0", within_s=60) if isinstance(d, WakeAt)]
    due = cluster.now + 60 - cluster.state.timeouts.form_s
    assert [wake.at for wake in wakes] == [due]

    taken_over = cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=2))

    assert [d.at for d in taken_over if isinstance(d, WakeAt)] == [due]


def test_memory_that_stands_still_is_not_waited_for_without_end(cluster: Any) -> None:
    training(cluster)
    drain(cluster, "node-0")
    limit_s = max(
        moments.STILL_SAVES * 5 * STEP_S, cluster.state.timeouts.form_s
    )  # runfiles: memoryEverySteps is 5
    begun = cluster.now
    while len(starts(cluster)) == 1 and cluster.now < begun + 2 * limit_s:
        cluster.train(1)

    assert limit_s < cluster.now - begun <= limit_s + 3 * STEP_S
    assert "memory has had nothing newer" in starts(cluster)[-1].reason


def test_no_swap_begins_while_a_node_of_the_world_may_be_back_at_once(cluster: Any) -> None:
    training(cluster)
    drain(cluster, "node-0")
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=2))
    cluster.join("node-0", generation=1, mark=5)
    cluster.join("node-2")
    cluster.train(1)
    cluster.hold(13)
    assert len(starts(cluster)) == 1

    cluster.join("node-1", generation=1, mark=5)
    cluster.train(1)
    cluster.hold(14)

    assert starts(cluster)[-1].seats[0] == "node-2"
    restart = cluster.state.incidents[0]
    assert (restart.kind, restart.reason) == (
        "controller-restart",
        "training was not interrupted",
    )


def test_a_restart_for_another_reason_takes_the_node_along(cluster: Any) -> None:
    training(cluster)
    drain(cluster, "node-0")

    cluster.after(0.1).exit(3, step=12)

    assert starts(cluster)[-1].seats == ("node-2", "node-2", "node-1", "node-1")
    assert cluster.state.incidents[-1].kind == "crash"
    assert cluster.state.budgets["hardware"].spent == 1


def test_what_is_lost_comes_before_what_is_to_be_free(cluster: Any) -> None:
    training(cluster)
    drain(cluster, "node-0")

    cluster.after(0.1).lose("node-1")

    assert starts(cluster)[-1].seats == ("node-0", "node-0", "node-2", "node-2")


@pytest.mark.parametrize("asked_again", [False, True], ids=["once", "twice"])
def test_a_node_that_was_taken_with_its_seats_does_not_get_them_back(
    cluster: Any,
    asked_again: bool,  # noqa: FBT001 - drawn, not passed by a reader
) -> None:
    training(cluster)
    cluster.lose("node-2")
    drain(cluster, "node-0", within_s=30)
    cluster.after(0.1).lose("node-0")
    assert cluster.state.incidents[-1].cause is Cause.HARDWARE

    cluster.after(0.1).join("node-0", incarnation=2)
    if asked_again:
        drain(cluster, "node-0", within_s=30)
    assert cluster.state.phase is RunPhase.GATHERING

    cluster.after(0.1).join("node-2", incarnation=2)
    assert starts(cluster)[-1].seats == ("node-2", "node-2", "node-1", "node-1")


def test_a_node_that_has_not_joined_may_be_cordoned_and_is_not_started_on(
    cluster_of: Callable[..., Any],
) -> None:
    cluster = cluster_of()
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=1))
    drain(cluster, "node-0")
    for node in ("node-0", "node-1", "node-2"):
        cluster.join(node)

    while cluster.state.phase is not RunPhase.SEARCHING:
        assert cluster.now < 20
        cluster.after(1).beat(step=0)
    cluster.found()

    assert starts(cluster)[0].seats == ("node-1", "node-1", "node-2", "node-2")


def test_without_the_policy_a_node_stays_until_it_is_lost(cluster_of: Callable[..., Any]) -> None:
    text = runfiles.text(trainer={"steps": 1000}, recovery={"disable": [PLANNED_SWAP]})
    cluster = training(cluster_of(text))
    drain(cluster, "node-0", within_s=1)
    for _ in range(20):
        cluster.train(1)
    cluster.hold(32)
    assert len(starts(cluster)) == 1
    assert "spec.recovery.disable has planned-swap" in planned.standing(
        cluster.state, NodeId("node-0")
    )

    cluster.after(0.1).lose("node-0")

    assert starts(cluster)[-1].seats == ("node-2", "node-2", "node-1", "node-1")
    assert cluster.state.incidents[-1].kind == "node-lost"


def test_a_request_that_is_taken_up_once_more_has_no_new_deadline(cluster: Any) -> None:
    training(cluster)
    asked = DrainRequested(
        at=cluster.at(),
        nodes=(NodeId("node-0"),),
        by="ann",
        within_s=300.0,
        late_s=20.0,
        request="r",
    )
    cluster.tell(asked)
    until = cluster.state.drains[NodeId("node-0")].until
    assert until == pytest.approx(cluster.now + 280.0)

    cluster.after(60).tell(msgspec.structs.replace(asked, at=cluster.at()))

    assert cluster.state.drains[NodeId("node-0")].until == until
