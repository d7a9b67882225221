"""Tells numbers that stand out from those of the steps before, by factors and not by amounts.

Letters: K numbers of a step, S steps that are remembered.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

WINDOW, LEAST = 128, 20
"""What a step is compared with: so many before it; fewer have no spread to speak of."""
FEW, EARLY = 3, 30.0
"""As long as there are fewer, but so many, a number stands out at so many times the largest:
numbers change fast when a run begins."""
LOSS, NORM = (8.0, 1.25), (15.0, 4.0)
"""How many deviations above the median, and how many times it. Of 2,400 steps of two runs without a
fault (tiny Llama, micro-batches of one sequence of 32 tokens) the largest losses were at 3.8
deviations and 1.16 times; 24 gradients of weights of 150,000 were beyond 10 deviations, and 4 times
was exceeded by one beyond 12 and none beyond 15."""
NEWEST = 4
"""A number has to be as many times the largest of so many steps, too, the last that there were:
those of some weights grow to 30 times what they began with while a run learns, and where numbers
are looked at in every eighth step, most of what there is to compare with is of long ago."""
ABOVE_KNOWN = 2.0
"""How many times what was found to be true a number has to be, to stand out once more."""
SURELY = 0.999
"""Leaves room for rounding where a number is compared, instead of its logarithm."""
_MOST, _LEAST = float(np.finfo(np.float64).max), float(np.finfo(np.float64).tiny)
LARGEST = math.log(_MOST)
_SMALLEST = math.log(_LEAST)
"""Stands for the logarithm of 0."""
_NORMAL = 1.4826
"""Standard deviations of normal noise in its median absolute deviation."""


class Outliers:
    """Looks at the same numbers of one step after the other: a loss, then norms of gradients.

    A number stands out if it is not finite, or if it is too many times the median of the steps
    before, and of the largest of the `NEWEST` of them, and its logarithm too many deviations above
    that median (`LOSS`, `NORM`). What stands out is not
    admitted to what later steps are compared with, or it would hide the next one. If it turns out
    to be true, it stands out no more for a while unless it is `ABOVE_KNOWN` times as large: where
    numbers rise for good, they are admitted then.

    Source: own rule. Thresholds were set with steps of runs without a fault, of other seeds than
    those of published results (docs/campaign.md).
    """

    def __init__(self) -> None:
        self._steps: list[Sequence[float]] = []
        self._usual: list[float] = []
        """What is no larger does not stand out, whatever the median is: a number for each."""
        self._known: npt.NDArray[np.float64] | None = None
        self._known_for = 0

    def forget(self) -> None:
        """Begin anew: numbers to come are of another kind."""
        self._steps, self._usual, self._known, self._known_for = [], [], None, 0

    def standing_out(self, values: Sequence[float]) -> list[int]:
        """Return which of the numbers of a step stand out, ascending."""
        # In nearly every step this is all, and done before numpy would have begun.
        if len(self._usual) == len(values) and all(map(operator.le, values, self._usual)):
            return []
        out_K = ~np.isfinite(values)
        if len(self._steps) >= FEW:
            out_K |= _logs(values) > self._limits()
        return np.flatnonzero(out_K).tolist()

    def times_usual(self, values: Sequence[float], number: int) -> float:
        """Return how many times its usual size one of the numbers is; not finite if it is not."""
        if not (self._steps and math.isfinite(values[number])):
            return math.inf
        above = float(_logs(values)[number] - np.median(_logs(self._steps)[:, number]))
        return math.exp(above) if above < LARGEST else math.inf

    def admit(self, values: Sequence[float]) -> None:
        """Compare later steps with this one, too, in which nothing stood out."""
        self._steps = [*self._steps[-WINDOW + 1 :], values]
        largest = map(max, zip(*self._steps[-NEWEST:], strict=True))
        self._usual = [
            min(SURELY * times * each, _MOST)
            for (_, times), each in zip(_rules(len(values)), largest, strict=True)
        ]
        self._known_for = max(self._known_for - 1, 0)
        if not self._known_for:
            self._known = None

    def let_be(self, values: Sequence[float]) -> None:
        """Take what stands out in a step for true, for as many steps as are remembered."""
        known_K = np.full(len(values), -np.inf)
        out = [at for at in self.standing_out(values) if math.isfinite(values[at])]
        if not out:
            return
        known_K[out] = _logs(values)[out] + math.log(ABOVE_KNOWN)
        self._known = known_K if self._known is None else np.maximum(self._known, known_K)
        self._known_for = WINDOW

    def _limits(self) -> npt.NDArray[np.float64]:
        logs_SK = _logs(self._steps)
        times_K = np.log([times for _, times in _rules(logs_SK.shape[1])])
        newest_K = logs_SK[-NEWEST:].max(0)
        known_K = newest_K if self._known is None else self._known
        limits_K: npt.NDArray[np.float64] = np.maximum(_limits(logs_SK), newest_K + times_K)
        return np.maximum(limits_K, known_K)


def _limits(logs_SK: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if len(logs_SK) < LEAST:
        largest_K: npt.NDArray[np.float64] = logs_SK.max(0)
        return _unless_nothing(largest_K, largest_K + math.log(EARLY))
    usual_K = np.median(logs_SK, 0)
    spread_K = _NORMAL * np.median(np.abs(logs_SK - usual_K), 0)
    rules_K2 = np.array(_rules(len(usual_K)))
    limits_K: npt.NDArray[np.float64] = np.log(rules_K2[:, 1])
    return _unless_nothing(usual_K, usual_K + np.maximum(rules_K2[:, 0] * spread_K, limits_K))


@lru_cache(maxsize=4)
def _rules(count: int) -> tuple[tuple[float, float], ...]:
    """Return deviations and times of each number of a step."""
    return (LOSS, *[NORM] * (count - 1))


def _unless_nothing(
    usual_K: npt.NDArray[np.float64], limits_K: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return limits, but none for numbers that are 0 as a rule: any other is many times that.

    Such are the gradients of what is seldom read, such as the part of an embedding.
    """
    return np.where(usual_K <= _SMALLEST, np.inf, limits_K)


def _logs(values: Sequence[float] | Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    """Return logarithms; of what is not finite, the largest there is."""
    array = np.asarray(values, np.float64)
    positive = np.maximum(np.where(np.isfinite(array), array, _MOST), _LEAST)
    logs: npt.NDArray[np.float64] = np.log(positive)
    return logs
