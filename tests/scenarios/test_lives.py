"""What a run that was ended and is run again still knows of the steps that led to its state."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core import journal
from orchestrator.core.events import CheckpointFound, ControllerStarted, StopRequested
from orchestrator.core.heritage import LOSSES_MAX, left_by
from orchestrator.core.report import losses_digest, report
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Generation, Seconds, Step
from tests.conftest import Cluster
from tests.journals import commit, text


def loss(step: int) -> float:
    return 1.0 / step


def train(life: Cluster, *steps: int) -> None:
    for step in steps:
        life.after(0.1).beat(step=step, report=True, loss=loss(step))


def stopped(life: Cluster) -> Cluster:
    life.after(0.1).tell(StopRequested(at=life.at(), by="a test"))
    return life


def first_life() -> Cluster:
    """Stopped at step 13, with a checkpoint of step 10 by generation 2."""
    life = Cluster()
    life.start()
    life.exit(1)
    life.resume()
    train(life, *range(1, 11))
    commit(life, 10)
    train(life, 11, 12, 13)
    return stopped(life)


def after(former: Cluster) -> Cluster:
    """The life after `former`, as its controller takes over."""
    life = Cluster()
    for event in left_by(former.state, life.at()):
        assert life.tell(event) == []
    life.after(0.1).tell(ControllerStarted(at=life.at(), incarnation=1))
    for node in ("node-0", "node-1", "node-2"):
        life.join(node)
    return life


def restore(life: Cluster, step: int | None, epoch: int = 2) -> Cluster:
    """The search of a new life finds this, and training goes on from there."""
    life.after(0.1).tell(
        CheckpointFound(
            at=life.at(),
            step=None if step is None else Step(step),
            epoch=None if step is None else Generation(epoch),
            key="" if step is None else f"commits/{step}",
            epoch_seen=Generation(0 if step is None else epoch),
        )
    )
    life.resume()
    return life


def test_losses_of_a_run_that_was_run_again_are_those_of_all_its_steps() -> None:
    life = restore(after(first_life()), 10)
    assert [step for step, _ in report(life.state).losses] == list(range(1, 11))

    train(life, *range(11, 16))

    told = report(life.state)
    whole = [(Step(step), loss(step)) for step in range(1, 16)]
    assert told.losses == whole
    assert told.losses_digest == losses_digest(whole)
    assert told.losses_missing == []
    # Numbers of generations are not given twice, in no life.
    assert told.generation == 3
    assert told.generations == 1


def test_the_journal_of_a_later_life_is_enough_to_tell_of_the_former_ones() -> None:
    life = restore(after(first_life()), 10)
    train(life, *range(11, 16))

    fresh = Cluster()
    assert journal.replay(fresh.controller, journal.read(text(life)).entries) == []

    assert report(fresh.state) == report(life.state)


def test_what_a_former_life_computed_beyond_the_checkpoint_is_not_compared_and_forgotten() -> None:
    life = restore(after(first_life()), 10)

    # The job was repaired between the two lives, and computes something else.
    life.after(0.1).beat(step=11, report=True, loss=7.0)
    life.after(0.1).beat(step=13, report=True, loss=7.0)

    told = report(life.state)
    assert told.losses[10:] == [(11, 7.0), (13, 7.0)]
    assert told.losses_missing == [12]
    assert told.divergences == []


def test_a_run_that_begins_anew_has_no_losses_of_a_former_life() -> None:
    former = Cluster()
    former.start()
    train(former, 1, 2, 3)

    life = restore(after(stopped(former)), None)
    train(life, 1)

    assert report(life.state).losses == [(1, loss(1))]


def test_a_life_that_ended_before_it_found_anything_passes_on_what_it_was_left() -> None:
    between = stopped(after(first_life()))
    assert report(between.state).losses == []

    life = restore(after(between), 10)
    train(life, 11)

    told = report(life.state)
    assert [step for step, _ in told.losses] == list(range(1, 12))
    assert told.losses_missing == []
    assert told.generation == 3


def test_a_step_that_nobody_reported_in_a_former_life_is_missing_in_every_later_one() -> None:
    former = Cluster()
    former.start()
    train(former, 1, 2, 4, 5)
    commit(former, 5)

    life = restore(after(stopped(former)), 5, epoch=1)

    assert report(life.state).losses_missing == [3]


def test_a_step_that_came_out_differently_in_a_former_life_stays_in_doubt() -> None:
    former = Cluster()
    former.start()
    train(former, 1, 2, 3)
    former.exit(1)
    former.resume()
    former.after(0.1).beat(step=1, report=True, loss=9.0)
    train(former, 2)
    commit(former, 2)

    assert report(restore(after(stopped(former)), 2).state).divergences == [1]


def test_losses_of_a_life_whose_journal_is_gone_are_neither_told_nor_missed() -> None:
    life = restore(after(first_life()), 60, epoch=9)
    train(life, 61)

    told = report(life.state)

    assert told.losses == [(61, loss(61))]
    assert told.losses_missing == []
    later = restore(after(stopped(life)), 60, epoch=9)
    train(later, 61)
    assert (report(later.state).losses, report(later.state).losses_missing) == (told.losses, [])


def test_what_is_left_may_be_told_again_by_a_controller_that_finds_half_of_it() -> None:
    former = RunState(run=first_life().run, timeouts=first_life().state.timeouts)
    former.losses = {Step(step): loss(step) for step in range(1, 2 * LOSSES_MAX)}

    events = left_by(former, Seconds(0.0))
    life = Cluster()
    for event in (events[0], *events):
        life.tell(event)

    assert life.state.commits == []
    assert [len(event.losses) for event in events] == [LOSSES_MAX, LOSSES_MAX - 1]
    assert life.state.losses == former.losses


def test_a_durable_tier_that_lost_what_any_former_life_committed_is_not_begun_anew_in() -> None:
    life = first_life()
    for _ in range(3):
        # None of these lived long enough to find out what the durable tier has.
        life = stopped(after(life))

    life = after(life)
    life.after(0.1).tell(CheckpointFound(at=life.at(), step=None, epoch=None, key=""))

    assert life.state.end_state == "Failed"
    assert "this run committed some, the newest of step 10" in life.state.end_reason
    assert "is the volume mounted?" in life.state.end_reason
    assert life.state.generation == 0


def test_a_checkpoint_that_was_not_to_be_had_in_one_life_may_be_in_the_next() -> None:
    life = after(first_life())
    life.after(0.1).tell(CheckpointFound(at=life.at(), step=None, epoch=None, key=""))
    assert [commit.rejected != "" for commit in life.state.commits] == [True]

    life = restore(after(life), 10)

    assert [(c.step, c.epoch, c.rejected) for c in life.state.commits] == [(10, 2, "")]
    assert life.state.start_step == 10


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5))
def test_however_often_a_run_is_ended_its_losses_have_no_step_twice_and_none_missing(
    lives: list[tuple[int, int]],
) -> None:
    former: Cluster | None = None
    durable: tuple[int, int] | None = None
    for steps, saved in lives:
        if former is None:
            life = Cluster()
            life.start()
        else:
            life = restore(after(former), *(durable or (None,)))
        first = life.state.reached_step + 1
        train(life, *range(first, first + steps))
        if saved and saved <= steps:
            durable = (first + saved - 1, life.state.generation)
            commit(life, durable[0])
        told = report(life.state)
        assert told.losses == [(step, loss(step)) for step in range(1, first + steps)]
        assert told.losses_missing == told.divergences == []
        former = stopped(life)
