"""Exact intervals, against published ones."""

import numpy as np
import pytest

from orchestrator.campaign.intervals import at_most, clopper_pearson, of_median


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 5.
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0000, 0.1684),
        (1, 29, 0.0009, 0.1776),
    ],
)
def test_the_interval_of_a_share_is_the_published_one(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert clopper_pearson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_without_a_miss_the_limit_is_the_root_that_is_known_in_closed_form() -> None:
    for trials in (1, 40, 299, 30_000):
        low, high = clopper_pearson(trials, trials)

        assert low == pytest.approx(0.025 ** (1 / trials), rel=1e-9)
        assert high == 1.0


def test_an_interval_has_the_share_in_it_and_mirrors_that_of_its_opposite() -> None:
    for successes in range(13):
        low, high = clopper_pearson(successes, 12)
        other = clopper_pearson(12 - successes, 12)

        assert low <= successes / 12 <= high
        assert (low, high) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-12)


def test_of_no_trial_nothing_is_known() -> None:
    assert clopper_pearson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("successes", "trials", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)]
)
def test_more_successes_than_trials_and_no_level_are_refused(
    successes: int, trials: int, level: float
) -> None:
    with pytest.raises(ValueError, match="of"):
        clopper_pearson(successes, trials, level)


def test_the_binomial_distribution_sums_what_can_be_counted() -> None:
    assert at_most(1, 3, 0.5) == pytest.approx(4 / 8)
    assert at_most(2, 3, 0.1) == pytest.approx(1 - 0.001)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    chance = np.random.Generator(np.random.Philox(3))
    held = 0
    for _ in range(400):
        _, (low, high) = of_median(chance.exponential(size=21).tolist())
        held += low <= np.log(2.0) <= high

    assert held >= 0.93 * 400
    assert of_median(range(1, 21)) == (10.5, (6, 15))
    with pytest.raises(ValueError, match="no values"):
        of_median([])
