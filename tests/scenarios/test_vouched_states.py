"""Which checkpoints replays vouch for, and which of all states a run goes back to by that."""

from typing import Any

import pytest

from orchestrator.core.decisions import JudgeCheckpoint, SearchCheckpoints, StartGeneration
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointJudged,
    ControllerStarted,
)
from orchestrator.core.heritage import left_by
from orchestrator.core.trust import Verdict
from orchestrator.protocol.ids import Generation, NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import DetectorFailed, StateDiverged
from tests.conftest import Cluster
from tests.journals import unheard


def commit(cluster: Any, step: int, epoch: int | None = None) -> list[Any]:
    generation = cluster.state.generation if epoch is None else Generation(epoch)
    key = f"commits/{step}"
    return judged(
        cluster.tell(
            CheckpointCommitted(at=cluster.at(), step=Step(step), epoch=generation, key=key)
        )
    )


def train_to(cluster: Any, step: int, *, held: bool = False) -> None:
    cluster.train(step - cluster.state.reached_step)
    if held:
        cluster.hold(step)


def replay(cluster: Any, step: int) -> list[Any]:
    """Take steps up to one in which all ranks come to the same as others do; return verdicts."""
    train_to(cluster, step - 1)
    return judged(cluster.after(0.1).beat(step=step, report=True, replayed=step))


def judged(decisions: list[Any]) -> list[Any]:
    return [(d.step, d.verdict) for d in decisions if isinstance(d, JudgeCheckpoint)]


def on_record(cluster: Any, step: int, verdict: Verdict = Verdict.COMPUTE_VERIFIED) -> None:
    known = next(c for c in cluster.state.commits if c.step == step)
    cluster.tell(
        CheckpointJudged(
            at=cluster.at(), step=known.step, epoch=known.epoch, verdict=verdict, reason="a test"
        )
    )


def diverge(cluster: Any, since: int) -> list[Any]:
    """Have node-1 be proven to have made the state wrong after a step."""
    fact = StateDiverged(
        generation=cluster.state.generation,
        step=cluster.state.reached_step,
        since=Step(since),
        nodes=(NodeId("node-1"),),
        evidence="digests differ",
        proven=True,
    )
    return list(cluster.after(0.1).say("node-0", fact))


def newest_start(cluster: Any) -> Any:
    return [d for d in cluster.decisions if isinstance(d, StartGeneration)][-1]


def restored(cluster: Any) -> tuple[int, str]:
    restore = newest_start(cluster).restore
    return (restore.step, restore.commit)


COMPUTED = "compute-verified"


@pytest.fixture
def graded(cluster: Any) -> Any:
    """Trained to step 30: of 5 and 15 replays say that they are right, of 25 they do not yet."""
    cluster.start()
    for step in (5, 15):
        train_to(cluster, step)
        commit(cluster, step)
        assert replay(cluster, step + 3) == [(step, COMPUTED)]
        on_record(cluster, step)
    train_to(cluster, 25)
    commit(cluster, 25)
    train_to(cluster, 30, held=True)
    return cluster


def test_a_checkpoint_is_graded_once_all_ranks_computed_right_after_it(cluster: Any) -> None:
    cluster.start()
    train_to(cluster, 5)
    assert commit(cluster, 5) == []
    assert replay(cluster, 5) == []
    assert replay(cluster, 6) == [(5, COMPUTED)]
    # Neither again before it is on record, nor after that.
    assert replay(cluster, 9) == []
    on_record(cluster, 5)
    assert replay(cluster, 12) == []

    (order,) = [d for d in cluster.decisions if isinstance(d, JudgeCheckpoint)]
    assert order.epoch == 1
    assert order.reason == (
        "each of 4 ranks had its last micro-batch of step 6 come out the same on another rank; "
        "so in 2 steps of generation 1, otherwise in none"
    )


def test_one_that_is_committed_late_is_graded_at_once_and_several_by_one_replay(
    cluster: Any,
) -> None:
    cluster.start()
    replay(cluster, 10)

    assert commit(cluster, 5) == [(5, COMPUTED)]
    commit(cluster, 12)
    commit(cluster, 14)
    assert replay(cluster, 20) == [(14, COMPUTED), (12, COMPUTED)]


def test_a_verdict_that_is_not_on_record_is_ordered_again_by_the_next_controller(
    cluster: Any,
) -> None:
    cluster.start()
    commit(cluster, 5)
    replay(cluster, 8)

    again = cluster.tell(ControllerStarted(at=cluster.at(), incarnation=2))

    assert judged(again) == [(5, COMPUTED)]
    on_record(cluster, 5)
    assert judged(cluster.tell(ControllerStarted(at=cluster.at(), incarnation=3))) == []


def test_what_another_generation_made_or_what_is_barred_is_not_graded(cluster: Any) -> None:
    cluster.start()
    train_to(cluster, 10, held=True)
    commit(cluster, 5)
    commit(cluster, 8)
    on_record(cluster, 8, Verdict.SUSPECT)
    cluster.after(0.1).exit(1, step=10)
    cluster.resume()
    assert cluster.state.generation == 2
    commit(cluster, 12)
    on_record(cluster, 12, Verdict.SUSPECT)
    commit(cluster, 14)

    assert replay(cluster, 20) == [(14, COMPUTED)]


def test_a_replay_of_an_older_generation_or_of_a_wrong_state_vouches_for_nothing(
    cluster: Any,
) -> None:
    cluster.start()
    train_to(cluster, 10, held=True)
    commit(cluster, 5)
    late = unheard(cluster.at(), generation=7, replayed=Step(9))
    assert judged(cluster.tell(late)) == []
    diverge(cluster, since=3)
    assert judged(cluster.after(0.1).beat(step=11, replayed=11)) == []


def test_a_run_goes_back_to_the_newest_state_that_replays_vouch_for(graded: Any) -> None:
    (search,) = diverge(graded, since=30)
    assert isinstance(search, SearchCheckpoints)
    assert search.graded is True
    assert "the newest checkpoint that is compute verified is step 15" in search.reason
    less = "step 25, epoch 1: written, expected compute verified"
    graded.after(0.1).found(15, graded=True, ungraded=(less,))

    assert restored(graded) == (15, "commits/15")
    assert (
        "it is the newest that is compute verified, passed over step 30 in memory, "
        f"{less}: no replay vouches for that" in newest_start(graded).reason
    )
    # It was passed over, not found bad.
    assert graded.state.committed(Step(25))
    assert graded.state.save_failures == []


def test_a_search_is_asked_again_in_the_same_way_by_the_next_controller(graded: Any) -> None:
    diverge(graded, since=30)

    again = graded.tell(ControllerStarted(at=graded.at(), incarnation=2))

    (search,) = [d for d in again if isinstance(d, SearchCheckpoints)]
    assert (search.number, search.graded) == (3, True)


def test_memory_serves_if_replays_vouch_for_what_it_has(graded: Any) -> None:
    replay(graded, 32)
    on_record(graded, 25)
    train_to(graded, 35)

    diverge(graded, since=33)

    assert restored(graded) == (30, "")
    assert newest_start(graded).reason.endswith("; replays vouch for the states up to step 31")


def test_an_onset_before_it_takes_a_grade_its_worth(graded: Any) -> None:
    diverge(graded, since=12)
    graded.after(0.1).found(5, graded=True, rejected=("step 15, epoch 1: made after it",))

    assert restored(graded) == (5, "commits/5")


def test_what_the_store_can_not_vouch_for_any_more_leaves_the_newest_of_all(graded: Any) -> None:
    diverge(graded, since=30)
    graded.after(0.1).found(25, rejected=("step 15, epoch 1: quarantined: by hand",))

    assert restored(graded) == (30, "")
    assert "nothing from before the onset is compute verified" in newest_start(graded).reason


def test_without_any_grade_the_newest_state_is_taken_and_that_is_said(cluster: Any) -> None:
    cluster.start()
    replay(cluster, 4)
    train_to(cluster, 10, held=True)

    diverge(cluster, since=10)

    assert restored(cluster) == (10, "")
    assert "nothing from before the onset is compute verified" in newest_start(cluster).reason


def test_where_replays_were_switched_off_nobody_asks_for_them(graded: Any) -> None:
    off = DetectorFailed(
        generation=Generation(1), ranks=(Rank(0),), detector="replays", reason="two kinds"
    )
    graded.say("node-0", off)

    diverge(graded, since=30)

    assert restored(graded) == (30, "")
    assert "compute verified" not in newest_start(graded).reason


def test_a_crash_costs_no_more_for_it(graded: Any) -> None:
    graded.after(0.1).exit(1, step=30)

    assert restored(graded) == (30, "")


def test_what_was_restored_is_vouched_for_as_far_as_it_was_before(graded: Any) -> None:
    graded.after(0.1).exit(1, step=30)
    graded.resume()
    assert graded.state.replays_vouch_for == 17
    train_to(graded, 33)

    (search,) = diverge(graded, since=33)

    assert isinstance(search, SearchCheckpoints)
    graded.after(0.1).found(15, graded=True)
    assert restored(graded) == (15, "commits/15")
    assert graded.state.replays_vouch_for == 15


def test_the_next_life_knows_what_was_graded(graded: Any) -> None:
    later = Cluster()
    for event in left_by(graded.state, Seconds(0.0)):
        later.tell(event)

    found = {c.step: c.verdicts for c in later.state.commits}

    assert found == {5: {COMPUTED}, 15: {COMPUTED}, 25: set()}
