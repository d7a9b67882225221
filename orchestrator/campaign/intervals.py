"""Exact confidence intervals of a share, of a median, and of other quantiles.

A recall of 20 of 20 is no proof of 100 %: the interval says how far it is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

LEVEL = 0.95
_HALVINGS = 60


class Interval(NamedTuple):
    """Ends of an interval."""

    low: float
    high: float


def clopper_pearson(successes: int, trials: int, level: float = LEVEL) -> Interval:
    """Return the exact interval of a probability, from how often something came out in trials.

    Args:
        successes: how often, 0 to `trials`.
        trials: of how many; of none, nothing is known.
        level: of confidence, in (0, 1), both tails alike.

    Raises:
        ValueError: if that can not be.

    Source: Clopper, Pearson, Biometrika 26 (1934).

    >>> low, high = clopper_pearson(5, 10)
    >>> f"{low:.4f} {high:.4f}"
    '0.1871 0.8129'
    """
    if not 0 <= successes <= trials or not 0 < level < 1:
        raise ValueError(f"{successes} of {trials} at level {level}")
    tail = (1 - level) / 2
    low, high = 0.0, 1.0
    if successes > 0:
        # As many or more come out with this probability in `tail` of all cases.
        low = _root(lambda p: at_most(trials - successes, trials, 1 - p) - tail)
    if successes < trials:
        high = 1 - _root(lambda q: at_most(successes, trials, 1 - q) - tail)
    return Interval(low, high)


def at_most(successes: int, trials: int, probability: float) -> float:
    """Return the probability of so few successes or fewer: the binomial distribution's."""
    if successes >= trials or probability <= 0:
        return 1.0
    if probability >= 1:
        return 0.0
    fail, hit = math.log1p(-probability), math.log(probability)
    every = math.lgamma(trials + 1)
    return math.fsum(
        math.exp(
            every - math.lgamma(n + 1) - math.lgamma(trials - n + 1) + n * hit + (trials - n) * fail
        )
        for n in range(successes + 1)
    )


def of_median(values: Sequence[float], level: float = LEVEL) -> tuple[float, Interval]:
    """Return the median of some values and its interval, from their order alone.

    Raises:
        ValueError: without values.

    >>> of_median([3.0, 1.0, 2.0])  # too few for an interval at this level: all there is
    (2.0, Interval(low=1.0, high=3.0))
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values, expected at least one")
    count = len(ordered)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    cut = 0
    while cut < (count - 1) // 2 and 2 * at_most(cut, count, 0.5) <= 1 - level:
        cut += 1
    cut = max(cut - 1, 0)
    return middle, Interval(ordered[cut], ordered[count - 1 - cut])


class Quantile(NamedTuple):
    """A quantile of some values, and between which of them it lies."""

    value: float
    low: float | None
    """None, as of `high`, if there are too few values to say."""
    high: float | None


def of_quantile(values: Sequence[float], share: float, level: float = LEVEL) -> Quantile:
    """Return below which value a share of all lies, with its interval, from their order alone.

    Raises:
        ValueError: without values.

    >>> of_quantile([float(n) for n in range(1, 101)], 0.95)
    Quantile(value=95.0, low=90.0, high=100.0)
    >>> of_quantile([1.0, 2.0, 3.0], 0.95)
    Quantile(value=3.0, low=2.0, high=None)
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values, expected at least one")
    count, tail = len(ordered), (1 - level) / 2
    # The value at place n (from 1) is above the quantile if fewer than n values are below it.
    low = next(n for n in range(count + 1) if at_most(n, count, share) > tail)
    high = next((n for n in range(1, count + 1) if at_most(n - 1, count, share) >= 1 - tail), None)
    return Quantile(
        value=ordered[max(math.ceil(share * count), 1) - 1],
        low=None if low == 0 else ordered[low - 1],
        high=None if high is None else ordered[high - 1],
    )


def _root(rising: Callable[[float], float]) -> float:
    """Return where a function that rises from below 0 on [0, 1] is 0, to the last bits."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
