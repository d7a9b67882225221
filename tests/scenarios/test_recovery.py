"""What the controller orders when something breaks, told as it happens."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.core import journal
from orchestrator.core.controller import Controller
from orchestrator.core.decisions import (
    CatchUp,
    CommitCheckpoint,
    EndRun,
    FenceNode,
    SearchCheckpoints,
    StartGeneration,
)
from orchestrator.core.events import (
    CheckpointCommitted,
    CommitFailed,
    ControllerStarted,
    NodeDisconnected,
    StopRequested,
)
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
    Receipt,
    ShardsWritten,
)
from orchestrator.protocol.phases import RankPhase
from orchestrator.simulation import checkers
from tests import runfiles
from tests.journals import SHORT, finish, inject


def started(decisions: list[Any]) -> StartGeneration:
    (order,) = [d for d in decisions if isinstance(d, StartGeneration)]
    return order


def ended(decisions: list[Any]) -> EndRun:
    (order,) = [d for d in decisions if isinstance(d, EndRun)]
    return order


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


def test_a_stopped_process_is_named_and_dismissed_within_half_of_detect_within(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(20)
    begun = cluster.now
    decisions: list[Any] = []
    while not decisions and cluster.now < begun + 10:
        decisions = cluster.after(0.5).beat(
            step=20, moving=lambda _: False, states="SSTS", steps={2: 19}
        )

    order = started(decisions)
    assert cluster.now - begun <= 6.0
    assert order.dismiss == (2,)
    assert "state T" in cluster.state.incidents[-1].findings[0].evidence


def test_a_world_that_stands_still_is_a_hang_and_the_rank_behind_is_the_culprit(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(20)
    begun = cluster.now
    decisions: list[Any] = []
    while not decisions and cluster.now < begun + 20:
        decisions = cluster.after(0.5).beat(step=20, moving=lambda _: False, steps={3: 19})

    assert started(decisions).dismiss == (3,)
    assert cluster.now - begun <= 10.0
    spent = cluster.state.ledger.totals()[Bucket.DETECT]
    assert spent > 5_000_000


def test_a_hang_that_names_nobody_dismisses_everybody(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)
    decisions: list[Any] = []
    for _ in range(40):
        decisions = decisions or cluster.after(0.5).beat(step=20, moving=lambda _: False)

    assert started(decisions).dismiss == (0, 1, 2, 3)


def test_hang_is_not_reported_while_a_checkpoint_stalls_every_rank(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)

    for _ in range(120):
        phases = {1: RankPhase.CHECKPOINT}
        assert cluster.after(0.5).beat(step=20, moving=lambda _: False, phases=phases) == []


def test_a_world_that_waits_for_one_rank_that_waits_for_data_does_not_hang(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)

    for _ in range(120):
        phases = {1: RankPhase.DATA}
        beat = cluster.after(0.5).beat(step=20, moving=lambda rank: rank == 1, phases=phases)
        assert beat == []


def test_a_rank_that_is_done_is_no_reason_for_the_others_to_stand_still(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)
    phases = {0: RankPhase.DONE, 1: RankPhase.DONE}
    begun = cluster.now
    decisions: list[Any] = []
    while not decisions and cluster.now < begun + 20:
        cluster.after(0.5)
        decisions = cluster.beat(step=21, moving=lambda _: False, phases=phases, steps={3: 20})

    # Being done is announced, as saving is; only that nobody has to wait for it.
    assert started(decisions).dismiss == (3,)
    assert cluster.now - begun <= 10.0


def test_a_world_in_which_every_rank_is_done_may_stand_still(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)
    phases = dict.fromkeys(range(4), RankPhase.DONE)

    for _ in range(120):
        assert cluster.after(0.5).beat(step=21, moving=lambda _: False, phases=phases) == []


def test_nodes_that_say_nothing_but_that_they_are_done_have_come_all_the_way(
    cluster_of: Callable[..., Any],
) -> None:
    cluster = cluster_of(SHORT)
    cluster.start()
    cluster.train(20)
    cluster.hold(20)
    started(cluster.after(0.1).exit(1, step=20))

    # Restored behind the last step: there is none to complete, hence no other mark to be told.
    finish(cluster, dict.fromkeys(range(4), (1, 2)))

    assert cluster.state.phase is RunPhase.SUCCEEDED
    assert [incident.open for incident in cluster.state.incidents] == [False]


def test_a_suspended_machine_is_not_taken_for_a_hang_or_a_lost_node(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)

    cluster.after(3600).tick()
    cluster.after(0.5).beat(step=20, moving=lambda _: False)
    cluster.train(5)

    assert cluster.state.incidents == []


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


def test_a_checkpoint_is_committed_once_when_every_shard_is_written(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)

    def write(node: str, shards: tuple[int, ...]) -> list[Any]:
        receipts = tuple(Receipt(shard, 10, "d") for shard in shards)
        fact = ShardsWritten(generation=Generation(1), step=Step(5), receipts=receipts, model="m")
        return cluster.say(node, fact)

    assert write("node-0", (0,)) == []
    (commit,) = write("node-1", (1,))
    assert (commit.step, commit.generation) == (5, 1)
    assert write("node-1", (1,)) == []


def written(cluster: Any, step: int) -> list[Any]:
    """Both shards of a step are written; returns what is ordered then."""
    for node, shard in (("node-0", 0), ("node-1", 1)):
        fact = ShardsWritten(
            generation=cluster.state.generation,
            step=Step(step),
            receipts=(Receipt(shard, 10, "d"),),
            model="m",
        )
        decisions = cluster.say(node, fact)
    return decisions


def commits(decisions: list[Any]) -> list[int]:
    return [d.step for d in decisions if isinstance(d, CommitCheckpoint)]


@pytest.mark.parametrize(("again", "expected"), [(True, [5]), (False, [])])
def test_a_commit_that_failed_for_a_while_is_tried_again_and_one_that_never_can_is_not(
    cluster: Any,
    expected: list[int],
    *,
    again: bool,
) -> None:
    cluster.start()
    cluster.train(5)
    assert commits(written(cluster, 5)) == [5]

    failure = {"step": Step(5), "epoch": Generation(1), "reason": "no space", "again": again}
    assert commits(cluster.tell(CommitFailed(at=cluster.at(), **failure))) == []

    assert commits(cluster.after(0.5).beat(step=5)) == []
    assert commits(cluster.after(1.5).beat(step=5)) == expected


def test_a_commit_that_failed_is_not_tried_again_once_a_newer_one_stands(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    written(cluster, 5)
    failure = {"step": Step(5), "epoch": Generation(1), "reason": "no space", "again": True}
    cluster.tell(CommitFailed(at=cluster.at(), **failure))
    written(cluster, 6)

    cluster.tell(
        CheckpointCommitted(at=cluster.at(), step=Step(6), epoch=Generation(1), key="commits/6")
    )

    assert commits(cluster.after(3).beat(step=6)) == []


def test_a_successor_does_not_repeat_the_commit_of_a_generation_that_is_over(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    assert commits(written(cluster, 5)) == [5]
    cluster.exit(1, step=5)
    assert cluster.state.generation == 2

    decisions = cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=2))

    assert commits(decisions) == []


def test_a_successor_takes_over_without_disturbing_the_ranks(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)

    decisions = cluster.after(2).tell(ControllerStarted(at=cluster.at(), incarnation=2))
    for node in ("node-0", "node-1", "node-2"):
        generation = 0 if node == "node-2" else 1
        decisions += cluster.after(0.1).join(node, generation=generation, mark=5)

    assert not [d for d in decisions if isinstance(d, StartGeneration)]
    assert cluster.state.incidents[-1].kind == "controller-restart"
    assert cluster.state.phase is RunPhase.TRAINING


def test_a_successor_in_the_middle_of_a_recovery_goes_on_with_the_incident_it_is_for(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(20)
    cluster.tell(
        CheckpointCommitted(at=cluster.at(), step=Step(15), epoch=Generation(1), key="commits/15")
    )
    while not cluster.state.incidents:
        cluster.after(0.5).beat(step=20, moving=lambda _: False, states="SSTS")
    assert cluster.state.phase is RunPhase.SEARCHING

    cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=2))
    for node in ("node-0", "node-1", "node-2"):
        cluster.after(0.1).join(node, generation=1, mark=5)
    order = started(cluster.after(0.1).found(15))

    assert order.dismiss == (2,)
    assert order.incident == "inc-1"
    assert cluster.state.incidents[0].rung == "resume from the durable tier"
    assert cluster.state.budgets["hardware"].spent == 1
    cluster.resume()
    assert [incident.open for incident in cluster.state.incidents] == [False, False]


def test_ranks_that_died_with_their_agent_while_no_controller_lived_are_restarted_in_place(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    cluster.lose("node-2")

    cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=2))
    cluster.join("node-0", generation=1, mark=5)
    order = started(cluster.after(0.1).join("node-1", incarnation=2))

    assert order.seats == ("node-0", "node-0", "node-1", "node-1")
    assert order.restore is not None
    assert order.restore.sources == ("node-0",) * 4
    assert cluster.state.incidents[-1].kind == "node-lost"
    assert "came back as incarnation 2" in order.reason
    cluster.resume()
    assert cluster.tick() == []


def test_a_node_whose_agent_was_replaced_before_it_said_a_word_gets_no_seat_twice(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    # Ordered, and perhaps taken up: nobody who knows has lived to tell.
    assert started(cluster.after(0.1).exit(1)).generation == 2
    cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=2))
    cluster.join("node-0", generation=2)

    cluster.after(0.1).join("node-1", incarnation=2)

    assert started(cluster.rest()).generation == 3


def test_a_node_that_missed_its_order_is_told_again_when_it_connects(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    cluster.exit(1)

    told = cluster.after(0.3).join("node-1", generation=1, mark=5)

    assert [(type(d), d.node, d.generation) for d in told] == [(CatchUp, "node-1", 2)]


def test_a_stop_ends_the_run_and_names_who_asked(cluster: Any) -> None:
    cluster.start()

    order = ended(cluster.tell(StopRequested(at=cluster.at(), by="holdfast stop")))

    assert order.state == "Stopped"
    assert cluster.tick() == []


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
