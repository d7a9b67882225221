"""In how many steps something has its turn follows from what it was seen to take."""

import time

import pytest

from trainer.turns import LONGEST, STEPS_MIN, Turns

RANKS = 3


def told(turns: Turns, steps: int, looks_s: float, step_s: float) -> list[float]:
    """Take steps of which each takes so long, and the looks of a turn together as well."""
    words = []
    for _ in range(steps):
        words.append(turns.word())
        turns._looking_s += looks_s / turns.every
        turns.stepped(step_s + looks_s / turns.every)
    return [*words, turns.word()]


def test_what_a_turn_takes_is_told_once_it_was_seen_over_whole_turns() -> None:
    turns = Turns(0.01, 5)

    words = told(turns, 20, looks_s=0.3, step_s=1.0)

    assert words[:20] == [0.0] * 20, "four turns are the first that are no fewer than 16 steps"
    assert STEPS_MIN == 16
    assert words[20] == pytest.approx(0.3)
    assert turns.word() == 0.0, "once"


def test_turns_come_as_rarely_as_their_share_asks_for_and_ranks_agree_on_it() -> None:
    turns = Turns(0.01, 5)

    assert not turns.agree([0.3, 0.0, 0.0]), "most do not know what it takes them"
    assert turns.agree([0.3, 0.29, 0.9])
    assert turns.every == 30, "0.3 steps for 0.01 of each: of three, the one in the middle"
    assert not turns.agree([0.34] * RANKS), "what is measured has noise"
    assert turns.agree([0.1] * RANKS)
    assert turns.every == 10, "also more often again"
    assert turns.agree([10.0] * RANKS)
    assert turns.every == LONGEST * 5


def test_what_may_take_all_the_time_is_at_every_step_and_what_is_not_measured_stays() -> None:
    always, unknown, fixed = Turns(1.0, 7), Turns(0.01, 7, measured=False), Turns.fixed(3)
    for turns in (always, unknown, fixed):
        told(turns, 2 * STEPS_MIN, looks_s=5.0, step_s=1.0)
        assert turns.word() == 0.0
        assert not turns.agree([5.0] * RANKS)

    assert (always.every, unknown.every, fixed.every) == (1, 7, 3)


def test_looking_counts_this_threads_processor_time_and_not_what_it_waits() -> None:
    turns = Turns(0.01, STEPS_MIN)
    begun = time.thread_time()
    for _ in range(STEPS_MIN):
        with turns.looking():
            time.sleep(0.002)
        turns.stepped(1.0)

    spent_s = time.thread_time() - begun
    assert turns.word() <= 1.01 * spent_s, "of steps of a second"
