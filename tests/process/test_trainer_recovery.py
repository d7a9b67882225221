"""Real ranks of the trainer lose each other, and end with the bits of ranks that did not."""

import os
import signal
import time

import pytest

from orchestrator.agent.warm import Warm
from orchestrator.protocol.rank import SlotFreed
from tests.programs.alone import one_rank
from tests.programs.played import slots_of
from tests.programs.seated import JOB, SLOTS, Result, a_world, left_alone

pytestmark = pytest.mark.process
ENTRYPOINT = "tests.programs.wearing:main"


@pytest.fixture(scope="module")
def expected(warm: Warm) -> Result:
    """What the run comes to that is left alone."""
    return left_alone(warm)


def test_a_run_whose_ranks_are_killed_ends_with_the_bits_of_one_that_was_left_alone(
    warm: Warm, expected: Result
) -> None:
    with a_world(warm, parked=7) as world:
        for step, rank in ((2, 1), (7, 0), (16, 3)):
            world.until(lambda step=step: world.step() >= step)
            world.kill(rank)
            world.begin()
        world.until(world.finished)

        assert world.result() == expected
        assert [step for step, _ in expected[1]] == list(range(1, 25))
        assert world.restored_from[4] == 0
        assert world.restored_from[8] in (3, 6)


def test_nobody_saves_while_one_rank_has_no_free_slot_and_all_do_when_it_has(
    warm: Warm, expected: Result
) -> None:
    with a_world(warm, parked=4, without_slots=(2,)) as world:
        world.until(lambda: world.step() >= 8)
        assert world.saves == {}

        for slot in SLOTS:
            world.ranks[2].send(SlotFreed(slot=slot))
        world.until(world.finished)

        steps = sorted(world.saves)
        assert steps[0] >= 9
        assert len(steps) > 1, "only the last step was saved"
        assert steps[-1] == 24
        assert all(ranks == {0, 1, 2, 3} for ranks in world.saves.values())
        log = (world.memory / "ranks.log").read_text()
        assert "step 3 is not saved: 1 of 4 ranks" in log
        assert "the first is rank 2" in log
        assert world.result() == expected


def test_survivors_of_a_frozen_rank_leave_within_a_second_of_being_told(
    warm: Warm, expected: Result
) -> None:
    with a_world(warm, parked=5) as world:
        world.until(lambda: world.step() >= 4)
        os.kill(world.ranks[2].process.pid, signal.SIGSTOP)
        world.until(world.still)

        told = time.monotonic()
        world.kill(2)
        world.begin()
        left_s = time.monotonic() - told
        world.until(world.finished)

        assert left_s < 1.0
        assert world.result() == expected


def test_a_world_that_is_broken_up_while_it_forms_is_formed_anew(
    warm: Warm, expected: Result
) -> None:
    with a_world(warm, parked=6) as world:
        for pause_s in (0.0, 0.01, 0.03, 0.06):
            until = time.monotonic() + pause_s
            world.until(lambda until=until: time.monotonic() >= until)
            world.begin()
        world.until(world.finished)

        assert world.result() == expected


def test_ranks_that_change_seats_map_nothing_of_the_ranks_they_were(
    warm: Warm, expected: Result
) -> None:
    with a_world(warm, parked=4) as world:
        for step in (5, 10):
            world.until(lambda step=step: world.step() >= step)
            world.ranks = {rank: world.ranks[(rank + 1) % world.size] for rank in world.ranks}
            world.begin()
        world.until(world.finished)

        for rank, member in world.ranks.items():
            assert {name[:10] for name in slots_of(member.process.pid)} == {f"rank-{rank:05d}"}
        assert world.result() == expected


def test_four_ranks_train_what_one_would(expected: Result) -> None:
    """The data does not depend on the number of ranks, nor, up to rounding, does the loss."""
    alone = one_rank({"trainer": JOB["trainer"]})

    losses = [loss for _, loss in alone[1]]
    assert losses == pytest.approx([loss for _, loss in expected[1]], rel=1e-5)


def test_a_process_that_can_not_get_rid_of_worlds_gives_way_to_a_parked_one(
    warm: Warm, expected: Result
) -> None:
    with a_world(warm, parked=5, worlds_max=0) as world:
        world.until(lambda: world.step() >= 2)
        world.begin()
        world.until(world.finished)

        assert world.stuck == 4
        assert world.result() == expected


def test_ranks_that_are_told_to_leave_again_and_again_nearly_always_keep_their_process(
    warm: Warm, expected: Result
) -> None:
    """Whether gloo notices that connections broke or not: about one in ten times it does not."""
    with a_world(warm, parked=5) as world:
        for _ in range(8):
            world.until(lambda: world.reached("stepped"))
            world.begin()
        world.until(world.finished)

        assert world.stuck <= 2
        assert world.result() == expected
