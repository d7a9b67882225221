"""What the controller orders when something breaks, told as it happens."""

import json
from typing import Any

import pytest

from orchestrator.core import journal
from orchestrator.core.controller import Controller
from orchestrator.core.decisions import FenceNode, SearchCheckpoints
from orchestrator.core.events import CheckpointCommitted, NodeDisconnected
from orchestrator.core.phases import Bucket, RunPhase
from orchestrator.core.report import report
from orchestrator.policy.recovery import ladder
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import (
    MARKS,
    Holding,
    NodeUnusable,
    PreparationFailed,
    RankExited,
    RanksTroubled,
    Reached,
)
from orchestrator.simulation import checkers
from tests.journals import inject
from tests.orders import ended, started


def test_a_run_starts_from_the_seed_on_the_first_nodes_and_keeps_the_spare(cluster: Any) -> None:
    order = cluster.start()

    assert order.seats == ("node-0", "node-0", "node-1", "node-1")
    assert order.restore is None
    assert order.buddies == {"node-0": "node-1", "node-1": "node-0"}
    assert cluster.state.phase is RunPhase.TRAINING
    assert cluster.state.spares() == ("node-2",)


def test_a_killed_rank_is_restarted_in_place_from_its_own_memory(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    cluster.train(3)

    order = started(cluster.after(0.02).exit(1, step=13))

    assert order.generation == 2
    assert order.seats == ("node-0", "node-0", "node-1", "node-1")
    assert order.restore is not None
    assert order.restore.step == 10
    assert order.restore.sources == order.seats
    assert "signal 9" in order.reason
    cluster.resume()
    incident = cluster.state.incidents[-1]
    assert (incident.rung, incident.lost_steps, incident.open) == ("restart in place", 3, False)
    assert incident.ranks == (1,)


def test_a_lost_node_gives_its_seats_to_the_spare_which_restores_from_the_buddy(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)

    order = started(cluster.after(0.02).lose("node-1"))

    assert order.seats == ("node-0", "node-0", "node-2", "node-2")
    assert order.restore is not None
    assert order.restore.sources == ("node-0",) * 4
    assert cluster.state.incidents[-1].kind == "node-lost"
    assert "node-2 in place of node-1" in order.reason


def test_eight_late_exits_of_an_older_generation_change_nothing(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    old = cluster.state.generation
    cluster.exit(0)

    for _ in range(8):
        fact = RankExited(generation=old, rank=Rank(1), pid=1, code=-9, phase=6, step=Step(5))
        assert cluster.say("node-0", fact) == []

    assert cluster.state.generation == 2
    assert len(cluster.state.incidents) == 1


def test_a_rank_that_died_at_the_same_moment_is_part_of_the_same_incident(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    inject(cluster, 0, "kill-rank rank 1 at step 5", "rank 1", "node-0")
    inject(cluster, 1, "kill-rank rank 2 at step 5", "rank 2", "node-1")
    old = cluster.state.generation
    cluster.after(0.01).exit(1, step=5)
    fact = RankExited(generation=old, rank=Rank(2), pid=1, code=-9, phase=6, step=Step(5))

    assert cluster.after(0.01).say("node-1", fact) == []
    assert cluster.after(0.01).say("node-1", fact) == []

    (incident,) = cluster.state.incidents
    assert incident.ranks == (1, 2)
    assert [f.evidence.partition(" in ")[0] for f in incident.findings] == [
        "rank 1 on node-0 was ended by signal 9 (SIGKILL)",
        "rank 2 on node-1 was ended by signal 9 (SIGKILL)",
    ]
    assert incident.timeline[-1].text.startswith("also rank 2 on node-1")
    told = report(cluster.state)
    assert [fault.found_by for fault in told.faults] == ["inc-1", "inc-1"]
    assert cluster.state.budgets["hardware"].spent == 1


@pytest.mark.parametrize("trained", [False, True], ids=["leaving", "training again"])
def test_a_rank_that_is_killed_on_a_node_that_took_the_next_generation_up_is_part_of_the_incident(
    cluster: Any,
    trained: bool,  # noqa: FBT001 - drawn, not passed by a reader
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    old = cluster.state.generation
    cluster.after(0.01).exit(1, step=5)
    cluster.say("node-1", Reached(generation=Generation(2), mark=MARKS.index("cleared")))
    inject(cluster, 0, "kill-rank rank 2 at step 5", "rank 2", "node-1")
    if trained:
        cluster.resume()
    fact = RankExited(generation=old, rank=Rank(2), pid=2, code=-9, phase=6, step=Step(5))

    assert cluster.after(0.01).say("node-1", fact) == []

    (incident,) = cluster.state.incidents
    assert (incident.ranks, incident.nodes) == ((1, 2), ("node-0", "node-1"))
    assert cluster.state.generation == 2
    assert [fault.found_by for fault in report(cluster.state).faults] == ["inc-1"]


def test_an_exception_that_is_told_late_is_no_second_sign_of_a_fault_that_moves_with_the_job(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    old = cluster.state.generation
    cluster.exit(0, 1, step=5, kind="ValueError")
    late = RankExited(
        generation=old, rank=Rank(2), pid=2, code=1, phase=6, step=Step(5), kind="ValueError",
        message="x", traceback='  File "a.py", line 1, in f',
    )  # fmt: skip

    assert cluster.say("node-1", late) == []

    assert cluster.state.incidents[0].ranks == (0, 2)
    assert len(cluster.state.occurrences) == 1
    assert cluster.state.end_state == ""


def test_a_silent_node_is_swapped_and_fenced_when_it_comes_back(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    cluster.tell(NodeDisconnected(at=cluster.at(), node=NodeId("node-1")))
    begun = cluster.now
    decisions: list[Any] = []
    while not decisions and cluster.now < begun + 20:
        heard = ("node-0", "node-2")
        decisions = cluster.after(0.5).beat(step=5, heard=heard)

    assert started(decisions).seats[2:] == ("node-2", "node-2")
    assert cluster.now - begun <= 10
    (fence,) = [d for d in cluster.join("node-1", generation=1) if isinstance(d, FenceNode)]
    assert fence.node == "node-1"
    assert cluster.state.spares() == ("node-1",)


def test_a_node_that_loses_its_seat_before_it_says_that_it_took_it_is_fenced(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    assert "node-2" in started(cluster.lose("node-1")).seats
    cluster.after(0.01).join("node-1", incarnation=2)
    cluster.after(0.01).say("node-2", NodeUnusable(reason="a GPU fell off the bus"))

    # Its order is on its way, and nothing calls it back: its ranks would live on in generation 2.
    decisions = cluster.rest()

    order = started(decisions)
    assert (order.generation, {*order.seats}) == (3, {"node-0", "node-1"})
    fences = [d for d in decisions if isinstance(d, FenceNode)]
    assert [(d.generation, d.node) for d in fences] == [(3, "node-2")]
    checkers.check(cluster.run, cluster.entries)


def test_what_a_node_holds_of_an_abandoned_lineage_does_not_count_when_it_comes_back(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(8)
    cluster.hold(8)
    cluster.train(4)
    cluster.after(0.1).lose("node-1")
    assert cluster.state.start_step == 8
    held = tuple(Holding(Rank(rank), Step(step)) for rank in range(4) for step in (8, 12))

    cluster.join("node-1", generation=1, holdings=held)

    assert set(cluster.state.holders(Step(8), Rank(0))) >= {"node-1"}
    assert Step(12) not in cluster.state.holdings


def test_memory_counts_for_nothing_once_a_run_went_back_to_a_checkpoint(cluster: Any) -> None:
    cluster.start()
    cluster.train(8)
    cluster.hold(8)
    for node in ("node-0", "node-1"):
        cluster.after(0.1).join(node, incarnation=2)
    cluster.rest()
    started(cluster.found(8))
    held = tuple(Holding(Rank(rank), Step(8)) for rank in range(4))

    # A checkpoint of step 8 may be of another lineage than what somebody has in memory.
    cluster.join("node-2", generation=1, holdings=held)

    assert cluster.state.start_step == 8
    assert not cluster.state.holdings


def test_survivors_complaining_about_a_dead_peer_are_a_symptom_not_an_incident(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)

    fact = RanksTroubled(generation=Generation(1), ranks=(Rank(0),), message="reset by peer")
    assert cluster.say("node-0", fact) == []
    cluster.exit(2)

    assert len(cluster.state.incidents) == 1
    assert cluster.state.incidents[0].ranks == (2,)


def test_without_a_spare_the_run_waits_for_the_node_and_goes_on_when_it_is_back(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    cluster.lose("node-2")
    cluster.after(0.1).lose("node-1")
    assert cluster.state.phase is RunPhase.GATHERING

    order = started(cluster.after(5).join("node-1", incarnation=2))

    assert order.seats == ("node-0", "node-0", "node-1", "node-1")
    assert cluster.state.ledger.totals()[Bucket.WAIT_FOR_NODES] == pytest.approx(5e6, abs=1e4)


def test_without_any_node_the_run_gives_up_after_spare_wait_with_a_clear_reason(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.lose("node-2")
    cluster.lose("node-1")
    decisions: list[Any] = []
    for _ in range(70):
        cluster.after(1.0)
        decisions += cluster.beat(step=5)

    assert "needs 2 nodes and has 1, 0 of 1 spares free, after waiting 60 s" in (
        ended(decisions).reason
    )


def test_when_memory_is_gone_the_durable_tier_is_searched_and_rejections_are_told(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(60)
    cluster.tell(
        CheckpointCommitted(at=cluster.at(), step=Step(50), epoch=Generation(1), key="commits/50")
    )

    decisions = cluster.after(0.1).exit(1)
    assert any(isinstance(d, SearchCheckpoints) for d in decisions)
    order = started(cluster.after(0.1).found(40, rejected=("step 50: shard 1 is corrupt",)))

    assert order.restore is not None
    # Of two replicas each reads one of the two shards, and the other has it from there.
    assert (order.restore.step, order.restore.sources) == (40, ("", "node-1", "node-0", ""))
    assert order.restore.staged_as == (0, 3, 0, 3)
    assert cluster.state.incidents[-1].restored_from == (
        "durable tier (2 ranks), and from those who read it there (2 ranks)"
    )
    assert "step 50: shard 1 is corrupt" in order.reason


def test_an_older_commit_never_beats_a_newer_copy_in_memory(cluster: Any) -> None:
    cluster.start()
    cluster.train(60)
    cluster.tell(
        CheckpointCommitted(at=cluster.at(), step=Step(50), epoch=Generation(1), key="commits/50")
    )
    cluster.hold(60)

    order = started(cluster.exit(1))

    assert order.restore is not None
    assert order.restore.step == 60
    assert order.restore.commit == ""


def test_a_detector_that_raises_is_switched_off_and_training_goes_on(cluster: Any) -> None:
    class Broken:
        name = "broken"

        def observe(self, state: object, event: object) -> list[Any]:
            raise ZeroDivisionError("of its own making")

    cluster.controller = Controller(cluster.run, cluster.state.timeouts, [Broken()], ladder())
    cluster.start()
    cluster.train(3)

    assert cluster.controller.disabled == {"broken": "ZeroDivisionError: of its own making"}
    assert cluster.state.reached_step == 3


def test_a_replayed_step_with_other_bits_and_the_same_loss_is_noted_apart(cluster: Any) -> None:
    cluster.start()
    cluster.train(2)
    for digest in ("a", "b"):
        cluster.after(0.1).beat(step=2, digests=((Step(2), digest),))

    told = report(cluster.state)
    assert (told.divergences, told.digests_differ) == ([], [2])


def test_a_replayed_step_with_another_loss_is_noted_as_a_divergence(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    cluster.exit(1)
    cluster.resume()

    cluster.train(4)
    cluster.after(0.1).beat(step=5, report=True, loss=2.0000001)

    assert cluster.state.divergences == [5]


def test_state_that_can_not_be_read_from_memory_is_not_tried_twice(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    assert started(cluster.exit(1)).restore is not None
    fact = PreparationFailed(
        generation=Generation(2), step=Step(5), tier="memory", reason="slot 1 is damaged"
    )
    cluster.say("node-0", fact)
    cluster.rest()
    order = started(cluster.after(0.1).found())

    assert order.restore is None
    assert "slot 1 is damaged" in order.reason


def test_the_journal_of_a_scenario_replays_to_the_same_bytes(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    cluster.exit(1)
    cluster.resume()
    cluster.train(3)
    cluster.lose("node-1")
    header = journal.Header(run_id="r", run=cluster.run)
    data = journal.line(header) + b"".join(journal.line(entry) for entry in cluster.entries)

    read = journal.read(data)

    assert read.torn == ""
    assert json.loads(data.splitlines()[0].split(b" ", 1)[1])["run_id"] == "r"
    fresh = type(cluster)()
    assert journal.replay(fresh.controller, read.entries) == []
    assert fresh.state.generation == cluster.state.generation
    assert fresh.state.ledger.spans() == cluster.state.ledger.spans()
