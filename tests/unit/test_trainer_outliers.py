"""Numbers stand out by factors from those of the steps before, and data may have large ones."""

import math

import numpy as np
import pytest

from trainer.outliers import EARLY, FEW, LEAST, LOSS, NEWEST, NORM, WINDOW, Outliers


def used_to(scale: float = 1.0, steps: int = WINDOW) -> Outliers:
    """Return what has seen losses of about 5 and norms of about 1, times a scale."""
    chance = np.random.default_rng(7)
    known = Outliers()
    for _ in range(steps):
        known.admit((np.exp(chance.normal([1.6, 0.0], [0.02, 0.1])) * scale).tolist())
    return known


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e9])
def test_what_stands_out_does_so_at_any_scale(scale: float) -> None:
    known = used_to(scale)

    assert known.standing_out([5.0 * scale, 1.3 * scale]) == []
    assert known.standing_out([7.0 * scale, 50.0 * scale]) == [0, 1]
    assert known.times_usual([5.0 * scale, 50.0 * scale], 1) == pytest.approx(50, rel=0.1)


def test_less_than_usual_is_no_reason_to_look() -> None:
    assert used_to().standing_out([0.0, 0.0]) == []


def test_what_is_not_finite_stands_out_from_the_first_step_on() -> None:
    known = Outliers()

    assert known.standing_out([math.nan, 1.0]) == [0]
    assert known.standing_out([5.0, math.inf]) == [1]
    assert known.times_usual([5.0, math.inf], 1) == math.inf
    assert known.standing_out([5.0, 1e30]) == [], "there is nothing yet to compare with"


def test_a_run_that_has_just_begun_has_too_little_to_compare_with() -> None:
    assert used_to(steps=LEAST - 1).standing_out([5.0, 20.0]) == []
    assert used_to(steps=LEAST).standing_out([5.0, 20.0]) == [1]
    assert used_to(steps=FEW).standing_out([5.0, 1e6]) == [1]
    assert used_to(steps=FEW - 1).standing_out([5.0, 1e6]) == []


def test_numbers_that_are_always_the_same_have_no_spread_and_still_some_room() -> None:
    known = Outliers()
    for _ in range(LEAST):
        known.admit([5.0, 1.0])

    assert known.standing_out([5.1, 3.0]) == []
    assert known.standing_out([7.0, 5.0]) == [0, 1]


def test_numbers_that_rise_for_good_are_looked_at_a_few_times_and_then_known() -> None:
    known, looks = used_to(), 0
    for step in range(400):
        values = [5.0, 50.0 * (1 + step)]
        if known.standing_out(values):
            looks += 1
            known.let_be(values)
        else:
            known.admit(values)

    assert 1 <= looks <= 8


def test_an_outlier_that_was_true_hides_none_of_another_kind() -> None:
    known = used_to()
    known.let_be([5.0, 100.0])

    assert known.standing_out([5.0, 150.0]) == []
    assert known.standing_out([5.0, 250.0]) == [1]
    assert known.standing_out([50.0, 1.0]) == [0]


@pytest.mark.parametrize("steps", [FEW, LEAST, WINDOW])
def test_what_is_nothing_as_a_rule_stands_out_only_if_it_is_no_number(steps: int) -> None:
    """The gradient of what is seldom read: any number is many times nothing."""
    known = Outliers()
    for _ in range(steps):
        known.admit([5.0, 0.0])

    assert known.standing_out([5.0, 3.0]) == []
    assert known.standing_out([5.0, math.nan]) == [1]


def test_how_many_times_the_usual_may_be_more_than_there_are_numbers_for() -> None:
    known = Outliers()
    known.admit([5.0, 0.0])

    assert known.times_usual([5.0, 1e12], 1) == math.inf


@pytest.mark.parametrize("seed", [3, 4])
def test_numbers_that_grow_as_a_run_learns_do_not_stand_out_where_they_are_seldom_looked_at(
    seed: int,
) -> None:
    chance, known = np.random.default_rng(seed), Outliers()
    # As seen of a weight: from 0.005 to 0.14 while a run learns, the first steps looked at in turn.
    for step in [*range(18), *range(18, 400, 8)]:
        grown = 1 + 30 / (1 + math.exp((100 - step) / 12))
        values = [5.0, grown * float(np.exp(chance.normal(0.0, 0.15)))]

        assert known.standing_out(values) == [], f"at step {step}"
        known.admit(values)


def by_the_rule(steps: list[list[float]], values: list[float]) -> list[int]:
    """Say what stands out, from all that is to be compared with, as the rule is written down."""
    logs, new = np.log(steps[-WINDOW:]), np.log(values)
    rules = np.array([LOSS, *[NORM] * (len(values) - 1)])
    usual, largest = np.median(logs, 0), logs[-NEWEST:].max(0)
    spread = 1.4826 * np.median(np.abs(logs - usual), 0)
    above = (new > usual + np.log(rules[:, 1])) & (new > usual + rules[:, 0] * spread)
    if len(logs) < LEAST:
        above = new > logs.max(0) + math.log(EARLY)
    return np.flatnonzero(above & (new > largest + np.log(rules[:, 1]))).tolist()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_usual_is_told_at_a_glance_and_the_rule_is_still_the_same(seed: int) -> None:
    """Medians are asked for only where the newest steps do not settle it."""
    chance, known, steps = np.random.default_rng(seed), Outliers(), list[list[float]]()
    found = 0
    for _ in range(300):
        values = np.exp(chance.standard_t(3, 6) * [0.03, *[0.1] * 5])
        values[chance.integers(6)] *= np.exp(3.0 * chance.random() ** 4)
        values = values.tolist()
        out = known.standing_out(values)
        if len(steps) >= FEW:
            assert out == by_the_rule(steps, values)
            found += len(out)
        if not out:
            known.admit(values)
            steps.append(values)
    assert found > 5


def test_steps_as_usual_ask_for_no_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    median = np.median
    monkeypatch.setattr(np, "median", lambda *of: asked.append(1) or median(*of))
    known = used_to()
    for _ in range(50):
        assert known.standing_out([5.0, 1.2]) == []
        known.admit([5.0, 1.2])
    assert not asked

    assert known.standing_out([5.0, 60.0]) == [1]
    assert asked
    assert known.standing_out([5.0, math.inf]) == [1]


def test_a_number_of_no_size_at_all_stands_out_beside_the_largest_there_are() -> None:
    known = Outliers()
    for _ in range(LEAST):
        known.admit([1e308, 1e308])

    assert known.standing_out([math.inf, 1e308]) == [0]
    assert known.standing_out([1e308, math.nan]) == [1]
