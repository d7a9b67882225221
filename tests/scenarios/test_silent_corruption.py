"""What becomes of a run whose state turns out to be wrong, and of nodes that may have done it."""

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.cli import checkpoints, listing
from orchestrator.core.decisions import CommitCheckpoint, SearchCheckpoints, StartGeneration
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    ControllerStarted,
    DrainCancelled,
)
from orchestrator.core.heritage import left_by
from orchestrator.core.incident import Cause
from orchestrator.core.invariants import violations
from orchestrator.core.phases import Bucket, RunPhase
from orchestrator.core.report import report
from orchestrator.core.trust import Onset, trusted, why_not
from orchestrator.policy.quarantine import AGAIN_DAYS
from orchestrator.policy.switches import QUARANTINE_FIRST
from orchestrator.protocol.ids import Generation, NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import Receipt, ShardsWritten, StateDiverged
from tests import runfiles
from tests.conftest import Cluster
from tests.journals import write_step

DAY_S = 86_400.0


def diverge(
    cluster: Any,
    *nodes: str,
    since: int | None,
    proven: bool = False,
    generation: int | None = None,
    ranks: tuple[int, ...] = (),
    step: int | None = None,
    of_data: bool = False,
) -> list[Any]:
    state = cluster.state
    fact = StateDiverged(
        generation=state.generation if generation is None else Generation(generation),
        step=state.reached_step if step is None else Step(step),
        since=None if since is None else Step(since),
        nodes=tuple(map(NodeId, nodes)),
        ranks=tuple(map(Rank, ranks)),
        evidence="digests differ",
        proven=proven,
        of_data=of_data,
    )
    return list(cluster.after(0.1).say("node-0", fact))


def commit(cluster: Any, step: int, epoch: int | None = None) -> None:
    generation = cluster.state.generation if epoch is None else Generation(epoch)
    key = f"commits/{step}"
    cluster.tell(CheckpointCommitted(at=cluster.at(), step=Step(step), epoch=generation, key=key))


def trained(cluster: Any, steps: int = 12, held: int = 10, committed: int | None = 5) -> Any:
    """Train; memory has one step, the durable tier another."""
    cluster.start()
    for at in sorted({s for s in (committed, held, steps) if s}):
        cluster.train(at - cluster.state.reached_step)
        if at == committed:
            commit(cluster, at)
        if at == held:
            cluster.hold(at)
    return cluster


def starts(cluster: Any) -> list[StartGeneration]:
    return [d for d in cluster.decisions if isinstance(d, StartGeneration)]


def condition(cluster: Any, node: str) -> str:
    return listing.condition(cluster.state, cluster.state.nodes[NodeId(node)])


def test_a_state_is_trusted_if_no_onset_of_its_generation_or_a_later_one_is_before_it() -> None:
    onsets = [Onset(Step(10), Generation(3))]

    assert trusted(onsets, Step(10), Generation(3))
    assert not trusted(onsets, Step(11), Generation(3))
    assert not trusted(onsets, Step(11), Generation(1))
    assert trusted(onsets, Step(11), Generation(4))
    assert "nothing after step 10 is trusted" in why_not(onsets, Step(11), Generation(2))
    assert "nothing after the seed is" in why_not(
        [Onset(Step(0), Generation(1))], Step(5), Generation(1)
    )
    assert why_not(onsets, Step(9), Generation(2)) == ""


def test_a_successor_does_not_order_the_commit_of_what_was_found_corrupt_before_it_was_answered(
    cluster: Any,
) -> None:
    trained(cluster)
    assert write_step(cluster, 12) == [12]
    diverge(cluster, "node-1", since=7, proven=True)

    orders = cluster.after(0.1).tell(ControllerStarted(at=cluster.at(), incarnation=2))

    assert [d for d in orders if isinstance(d, CommitCheckpoint)] == []
    commit(cluster, 12)
    assert cluster.state.sound_commits == {5}


def test_a_node_that_is_proven_to_corrupt_is_out_at_once_and_the_run_goes_back_before_the_onset(
    cluster: Any,
) -> None:
    trained(cluster)

    (search,) = diverge(cluster, "node-1", since=7, proven=True)
    assert isinstance(search, SearchCheckpoints)
    assert search.onsets == (Onset(Step(7), Generation(1)),)
    assert condition(cluster, "node-1") == "Quarantined"
    cluster.after(0.1).found(5)

    order = starts(cluster)[-1]
    assert order.seats == ("node-0", "node-0", "node-2", "node-2")
    assert order.restore is not None
    assert order.restore.step == 5
    assert "node-2 in place of node-1 (quarantined) from step 5, 7 steps to do again" in (
        order.reason
    )
    (incident,) = cluster.state.incidents
    assert (incident.kind, incident.rung) == ("silent-corruption", "roll back before the onset")
    assert incident.quarantined == ("node-1",)
    assert cluster.state.budgets["hardware"].spent == 1


def test_a_node_whose_data_is_another_is_out_and_no_device_is_to_blame_for_it(
    cluster: Any,
) -> None:
    trained(cluster)

    diverge(cluster, "node-1", since=11, proven=True, of_data=True)

    known = cluster.state.quarantined[NodeId("node-1")]
    assert known.why.startswith("the data there is not that of other nodes: ")
    assert known.device == ""
    assert cluster.state.judging_devices == {}
    incident = cluster.state.incidents[-1]
    assert incident.cause is Cause.STORAGE
    assert "node-1" not in cluster.state.seats


def test_the_data_of_two_nodes_says_nothing_against_what_finds_wrong_devices(cluster: Any) -> None:
    trained(cluster)
    diverge(cluster, "node-1", since=11, proven=True, of_data=True)
    cluster.train(1)

    diverge(cluster, "node-0", since=11, proven=True)

    assert NodeId("node-0") in cluster.state.quarantined
    assert cluster.state.divergences_told[-1].proven
    assert not violations(cluster.state)


def test_memory_serves_if_what_it_has_is_not_newer_than_the_last_good_step(cluster: Any) -> None:
    trained(cluster)

    diverge(cluster, "node-1", since=10, proven=True)

    order = starts(cluster)[-1]
    assert order.restore is not None
    assert (order.restore.step, order.restore.commit) == (10, "")


def test_steps_that_came_of_it_are_lost_work_and_not_compared_with_those_done_again(
    cluster: Any,
) -> None:
    trained(cluster)
    before = cluster.state.ledger.totals()[Bucket.LOST_WORK]
    diverge(cluster, "node-1", since=10, proven=True)
    cluster.resume()
    cluster.after(0.1).beat(step=11, report=True, loss=7.0)

    lost = cluster.state.ledger.totals()[Bucket.LOST_WORK] - before
    assert lost == pytest.approx(2 * 0.1e6 + 0.1e6)
    assert cluster.state.ledger.totals()[Bucket.DETECT] == 0
    assert cluster.state.divergences == []
    (incident,) = report(cluster.state).incidents
    assert (incident.lost_steps, incident.false_alarm) == (2, False)


def test_a_checkpoint_from_after_the_onset_is_kept_shown_and_never_taken(cluster: Any) -> None:
    trained(cluster, committed=11)
    commit(cluster, 5, epoch=1)
    diverge(cluster, "node-1", since=7, proven=True)

    rows = {
        row["name"]: row
        for row in checkpoints.checkpoint_rows(cluster.state, None)  # type: ignore[arg-type]
        if row["tier"] == "durable"
    }
    assert rows["step-11"]["state"] == "Untrusted"
    assert "nothing after step 7 is trusted" in str(rows["step-11"]["why"])
    assert rows["step-5"]["state"] == "Committed"
    # An answer of who did not know yet is none.
    cluster.after(0.1).found(11)
    assert cluster.state.phase is RunPhase.SEARCHING
    cluster.after(0.1).found(5)
    assert starts(cluster)[-1].restore.step == 5  # type: ignore[union-attr]


def test_a_search_that_was_under_way_is_asked_again_with_the_onset(cluster: Any) -> None:
    trained(cluster, held=3, committed=11)
    commit(cluster, 5)
    (search,) = cluster.after(0.1).exit(1, step=12)
    assert isinstance(search, SearchCheckpoints)

    (again,) = diverge(cluster, "node-1", since=7, proven=True)

    assert isinstance(again, SearchCheckpoints)
    assert again.number == search.number + 1
    late = CheckpointFound(
        at=cluster.at(), step=Step(6), epoch=Generation(1), key="k", number=search.number
    )
    assert cluster.tell(late) == []


def test_what_is_written_or_committed_of_a_wrong_state_does_not_count(cluster: Any) -> None:
    trained(cluster, committed=None)
    diverge(cluster, "node-1", since=5, proven=True)
    receipts = tuple(Receipt(shard, 1, "d") for shard in range(cluster.state.shard_count()))
    for node in ("node-0", "node-1"):
        fact = ShardsWritten(generation=Generation(1), step=Step(12), receipts=receipts, model="m")
        decisions = cluster.say(node, fact)
        assert not [d for d in decisions if isinstance(d, CommitCheckpoint)]
    commit(cluster, 12, epoch=1)

    assert not cluster.state.committed(Step(12))
    assert cluster.state.holdings.of(Step(12)).ranks() == []


def test_a_quarantined_node_gets_no_seat_and_no_copies_until_it_is_uncordoned(
    cluster: Any,
) -> None:
    trained(cluster)
    diverge(cluster, "node-1", since=10, proven=True)
    cluster.resume()
    cluster.train(1)
    cluster.hold(11)
    cluster.after(0.1).join("node-1", incarnation=2)
    assert cluster.state.spares() == ()
    cluster.after(0.1).lose("node-0")
    assert cluster.state.phase is RunPhase.GATHERING

    cluster.tell(DrainCancelled(at=cluster.at(), nodes=(NodeId("node-1"),), by="ann"))

    assert starts(cluster)[-1].seats == ("node-1", "node-1", "node-2", "node-2")
    assert condition(cluster, "node-1") != "Quarantined"


def test_a_proven_node_is_out_without_a_spare_too_and_the_end_names_it(cluster: Any) -> None:
    trained(cluster)
    cluster.lose("node-2")
    diverge(cluster, "node-1", since=10, proven=True)
    assert cluster.state.phase is RunPhase.GATHERING

    for _ in range(100):
        if cluster.state.phase.final:
            break
        cluster.after(1).beat(step=12, heard=("node-0", "node-1"))

    assert "needs 2 nodes and has 1" in cluster.state.end_reason
    assert "quarantined: node-1" in cluster.state.end_reason


def test_of_several_suspects_as_many_leave_as_there_are_spares_the_most_suspected_first(
    cluster: Any,
) -> None:
    trained(cluster)

    diverge(cluster, "node-1", "node-0", since=10)

    assert set(cluster.state.quarantined) == {"node-1"}
    assert starts(cluster)[-1].seats == ("node-0", "node-0", "node-2", "node-2")


def test_a_spare_that_is_suspected_itself_replaces_nobody(cluster: Any) -> None:
    trained(cluster)

    diverge(cluster, "node-2", "node-1", since=10)

    assert set(cluster.state.quarantined) == {"node-2"}
    assert starts(cluster)[-1].seats == ("node-0", "node-0", "node-1", "node-1")


def test_who_is_suspected_a_second_time_is_out_with_or_without_a_spare(cluster: Any) -> None:
    trained(cluster)
    cluster.lose("node-2")
    diverge(cluster, "node-1", since=10)
    assert cluster.state.quarantined == {}
    cluster.resume()
    cluster.train(3)
    cluster.hold(13)

    diverge(cluster, "node-1", since=12)

    assert "for the second time" in cluster.state.quarantined[NodeId("node-1")].why


def test_without_the_policy_only_who_is_proven_or_suspected_again_leaves(
    cluster_of: Callable[..., Any],
) -> None:
    text = runfiles.text(trainer={"steps": 1000}, recovery={"disable": [QUARANTINE_FIRST]})
    cluster = trained(cluster_of(text))

    diverge(cluster, "node-1", since=10)
    assert starts(cluster)[-1].seats == ("node-0", "node-0", "node-1", "node-1")
    assert starts(cluster)[-1].restore.step == 10  # type: ignore[union-attr]
    cluster.resume()
    cluster.train(3)
    cluster.hold(13)
    diverge(cluster, "node-1", since=13)
    if cluster.state.phase is RunPhase.BACKING_OFF:
        cluster.rest()

    assert starts(cluster)[-1].seats == ("node-0", "node-0", "node-2", "node-2")


def test_if_nobody_stands_out_it_starts_everywhere_and_the_second_time_it_stops(
    cluster: Any,
) -> None:
    trained(cluster)
    diverge(cluster, since=10)
    order = starts(cluster)[-1]
    assert order.seats == ("node-0", "node-0", "node-1", "node-1")
    assert order.dismiss == (0, 1, 2, 3)
    cluster.resume()
    cluster.train(9)
    cluster.hold(19)

    diverge(cluster, since=15)

    assert cluster.state.phase is RunPhase.FAILED
    assert "silent corruption in inc-1 and again in inc-2" in cluster.state.end_reason
    assert len(starts(cluster)) == 2


def test_as_long_as_somebody_else_is_suspected_each_time_it_goes_on(cluster: Any) -> None:
    trained(cluster)
    cluster.lose("node-2")
    for node, good in (("node-0", 10), ("node-1", 13)):
        diverge(cluster, node, since=good)
        assert cluster.state.quarantined == {}
        cluster.resume()
        cluster.train(3)
        cluster.hold(cluster.state.reached_step)

    assert cluster.state.phase is RunPhase.TRAINING
    assert len(starts(cluster)) == 3


def test_long_after_nobody_stood_out_it_is_another_corruption(cluster: Any) -> None:
    trained(cluster)
    diverge(cluster, since=10)
    cluster.resume()
    cluster.train(9)
    cluster.hold(19)
    cluster.after(AGAIN_DAYS * DAY_S).beat(step=19)

    diverge(cluster, since=19)

    assert not cluster.state.phase.final


def test_an_agent_that_tells_it_again_changes_nothing(cluster: Any) -> None:
    trained(cluster)
    diverge(cluster, "node-1", since=10, step=12)
    cluster.resume()
    cluster.train(2)
    generation = cluster.state.generation

    assert diverge(cluster, "node-1", since=10, step=12, generation=1) == []

    assert cluster.state.generation == generation
    assert len(cluster.state.incidents) == 1


def test_what_is_found_of_an_older_generation_counts_if_the_present_one_continues_it(
    cluster: Any,
) -> None:
    trained(cluster)
    cluster.after(0.1).exit(1, step=12)
    cluster.resume()
    cluster.train(3)

    diverge(cluster, "node-1", since=7, generation=1, proven=True)

    assert cluster.state.phase is RunPhase.SEARCHING
    assert not trusted(cluster.state.onsets, Step(8), Generation(2))


def test_what_is_found_of_a_generation_that_was_left_behind_costs_no_rollback(
    cluster: Any,
) -> None:
    trained(cluster)
    diverge(cluster, since=10)
    cluster.resume()
    cluster.train(3)

    assert diverge(cluster, "node-2", since=11, generation=1, proven=True) == []

    assert condition(cluster, "node-2") == "Quarantined"
    assert trusted(cluster.state.onsets, Step(12), Generation(2))


def test_ranks_that_are_suspected_stand_for_their_nodes(cluster: Any) -> None:
    trained(cluster)

    diverge(cluster, since=10, ranks=(3,))

    assert set(cluster.state.quarantined) == {"node-1"}


def test_if_no_step_is_known_to_be_good_a_run_starts_over_from_the_seed(cluster: Any) -> None:
    trained(cluster)

    diverge(cluster, "node-1", since=None, proven=True)
    why = why_not(cluster.state.onsets, Step(5), Generation(1))
    cluster.after(0.1).found(None, rejected=(f"step 5, epoch 1: {why}",))

    order = starts(cluster)[-1]
    assert order.restore is None
    assert "start over from the seed" in order.reason
    assert "passed over step 5, epoch 1: made after a silent corruption" in order.reason
    assert "node-1" not in order.seats


def test_what_began_before_anything_was_durable_costs_no_more_than_what_was_never_good(
    cluster: Any,
) -> None:
    trained(cluster)

    diverge(cluster, "node-1", since=4, proven=True)
    cluster.after(0.1).found(None, rejected=("step 5, epoch 1: made after it",))

    assert starts(cluster)[-1].restore is None
    assert cluster.state.phase is RunPhase.STOPPING


def test_a_run_that_had_a_good_checkpoint_and_has_it_no_more_is_not_begun_anew(
    cluster: Any,
) -> None:
    trained(cluster)
    for step in (15, 20):
        cluster.train(step - cluster.state.reached_step)
        commit(cluster, step)

    diverge(cluster, "node-1", since=7, proven=True)
    cluster.after(0.1).found(None, rejected=("step 20, epoch 1: made after it",))

    assert cluster.state.phase is RunPhase.FAILED
    assert "none can be trusted: step 20, epoch 1" in cluster.state.end_reason


def test_a_later_life_does_not_know_what_there_was_and_begins_nothing_anew(cluster: Any) -> None:
    trained(cluster)
    later = Cluster()
    for event in left_by(cluster.state, Seconds(0.0)):
        later.tell(event)
    later.tell(ControllerStarted(at=later.at(), incarnation=1))
    for node in ("node-0", "node-1", "node-2"):
        later.join(node)
    assert starts(later) == []
    later.found(5)
    later.resume()
    later.train(3)

    diverge(later, "node-1", since=4, proven=True)
    later.after(0.1).found(None, rejected=("step 5, epoch 1: made after it",))

    assert later.state.phase is RunPhase.FAILED


def test_of_many_checkpoints_with_one_fault_an_end_says_it_once(cluster: Any) -> None:
    trained(cluster)

    diverge(cluster, "node-1", since=6, proven=True)
    rejected = [f"step {step}, epoch 1: made after it" for step in range(60, 0, -5)]
    cluster.after(0.1).found(None, rejected=tuple(rejected))

    words = "step 60, epoch 1: made after it (the same of 11 older, down to step 5, epoch 1)\n"
    assert words in cluster.state.end_reason


def test_of_many_checkpoints_with_a_fault_each_an_end_says_how_many_they_are(cluster: Any) -> None:
    trained(cluster)

    diverge(cluster, "node-1", since=6, proven=True)
    rejected = [f"step {step}, epoch 1: {'shard ' * 200}{step}" for step in range(60, 0, -1)]
    cluster.after(0.1).found(None, rejected=tuple(rejected))

    assert "; step 58, epoch 1: shard" in cluster.state.end_reason
    assert "; and 57 more, older still\n" in cluster.state.end_reason
    assert len(cluster.state.end_reason) < 1000


def test_the_next_life_trusts_what_was_not_trusted_no_more_and_uses_no_quarantined_node(
    cluster: Any,
) -> None:
    trained(cluster, committed=11)
    diverge(cluster, "node-1", since=7, proven=True)

    later = Cluster()
    for event in left_by(cluster.state, Seconds(0.0)):
        later.tell(event)
    later.tell(ControllerStarted(at=later.at(), incarnation=1))
    for node in ("node-0", "node-1", "node-2"):
        later.join(node)
    while later.state.phase is not RunPhase.SEARCHING:
        assert later.now < 20
        later.after(1).beat(step=0)

    (search,) = [d for d in later.decisions if isinstance(d, SearchCheckpoints)]
    assert search.onsets == (Onset(Step(7), Generation(1)),)
    assert later.state.spares() == ("node-0", "node-2")
    assert not later.state.committed(Step(11))
    assert violations(later.state) == []
