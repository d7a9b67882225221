"""When faults come: memoryless, with Weibull gaps, or in bursts; always at the same mean rate.

Only what interrupts the job comes by the chosen clock. The rest (flaps, slow nodes) and planned
operations stay memoryless: mixed in, they would hide the gaps that the clock is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gamma, isclose
from typing import Literal

import numpy as np

from orchestrator.faults.model import Bursts
from orchestrator.faults.quantities import Floats

Clock = Literal["poisson", "weibull", "bursty"]
WARM_UP_CYCLES = 10
"""Bad and calm times drawn before the job starts, so that it may start in either."""


def poisson(mean: float, window_s: float, rng: np.random.Generator) -> Floats:
    """Draw moments of a class that is expected `mean` times within the window."""
    return rng.uniform(0, window_s, rng.poisson(mean))


def weibull(mean: float, window_s: float, shape: float, rng: np.random.Generator) -> Floats:
    """Draw moments with Weibull gaps, from a process that has been running for long.

    A process that began with the job would have too many early: a shape below 1 means that
    a failure is likely soon after another.
    """
    if mean <= 0:
        return np.empty(0)
    scale_s = window_s / mean / gamma(1 + 1 / shape)
    # The gap into which the start falls is drawn by its length; the start is anywhere in it.
    straddling = scale_s * rng.gamma(1 + 1 / shape) ** (1 / shape)
    moments = [np.array([straddling * rng.random()])]
    while moments[-1][-1] < window_s:
        gaps = scale_s * rng.weibull(shape, int(mean * 1.1) + 16)
        moments.append(moments[-1][-1] + np.cumsum(gaps))
    together = np.concatenate(moments)
    return together[together < window_s]


def shared_out(moments: Floats, means: Sequence[float], rng: np.random.Generator) -> list[Floats]:
    """Deal the moments of one clock to classes, in proportion to what is expected of each."""
    total = sum(means)
    if not len(moments) or isclose(total, 0):
        return [np.empty(0) for _ in means]
    edges = np.cumsum(means) / total
    # The last edge may fall short of 1 by a rounding, and a draw lie beyond it.
    edges[-1] = 1.0
    whose = np.searchsorted(edges, rng.random(len(moments)), side="right")
    return [moments[whose == index] for index in range(len(means))]


class Weather:
    """Good and bad times of one run: how much of the mean rate has gone by at each moment.

    Args:
        bursts: the factors, and how long bad times last.
        window_s: length of the run.
        rng: where bad times begin.
    """

    def __init__(self, bursts: Bursts, window_s: float, rng: np.random.Generator) -> None:
        bad_s, calm_s = bursts.bad_time.mean_s, bursts.calm_mean_s
        cycles = int(window_s / (bad_s + calm_s) * 2) + 4 * WARM_UP_CYCLES
        spans = np.empty(2 * cycles)
        spans[::2] = rng.exponential(calm_s, cycles)
        spans[1::2] = bursts.bad_time.draw(rng, cycles)
        factors = np.tile([bursts.calm, bursts.bad], cycles)
        self._at_s = np.concatenate(([0.0], np.cumsum(spans))) - WARM_UP_CYCLES * (bad_s + calm_s)
        self._passed = np.concatenate(([0.0], np.cumsum(spans * factors)))
        self._window_s = window_s

    @property
    def factor(self) -> float:
        """Mean factor over the window."""
        begin, end = self._ends
        return float(end - begin) / self._window_s

    def moments(self, mean: float, rng: np.random.Generator) -> Floats:
        """Draw moments of a class that is expected `mean` times in a window of factor 1."""
        begin, end = self._ends
        drawn = rng.uniform(begin, end, rng.poisson(mean * self.factor))
        return np.asarray(np.interp(drawn, self._passed, self._at_s), dtype=np.float64)

    @property
    def _ends(self) -> Floats:
        return np.interp([0.0, self._window_s], self._at_s, self._passed)
