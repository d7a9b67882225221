"""What can be computed before anything runs: how often to save, how many spares, which ETTR.

All times are seconds. Letters of the formulas: M mean time between interruptions, D detection and
localisation, R restart, T interval between checkpoints, d time for which one checkpoint keeps
training waiting. All forms assume that interruptions come independently of each other at a
constant rate, that each costs D + R, and that it throws away what was computed since the last
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import exp, expm1, inf, isfinite, lgamma, log, log1p, sqrt
from typing import NamedTuple

from orchestrator.protocol.ids import Seconds

DAY_S = 86_400.0
OUT_MAX = 1e6
"""Nodes out of service, on average; beyond it the sums of a double get coarse."""
_LARGE = 1e200
_ALL_BUT_ONE = 1 - 1e-12
_EXPONENT_MAX = 700.0
"""Beyond it `exp` overflows; an ETTR there is zero to every digit that is shown."""


def young_interval_s(stall_s: float, mtti_s: float) -> Seconds:
    """Return the interval after which saving again costs least, to first order: sqrt(2 d M).

    Source: Young 1974.

    >>> round(young_interval_s(0.05, 2.781 * 3600), 1)
    31.6
    """
    _require(stall_s=stall_s, mtti_s=mtti_s)
    return Seconds(sqrt(2 * stall_s * mtti_s))


def daly_interval_s(stall_s: float, mtti_s: float) -> Seconds:
    """Return the interval after which saving again costs least, to higher order.

    sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M) - d; M if a checkpoint takes longer than 2 M.
    Source: Daly 2006.
    """
    _require(stall_s=stall_s, mtti_s=mtti_s)
    if stall_s >= 2 * mtti_s:
        return Seconds(mtti_s)
    half = stall_s / (2 * mtti_s)
    return Seconds(young_interval_s(stall_s, mtti_s) * (1 + sqrt(half) / 3 + half / 9) - stall_s)


def renewal_ettr(*, interval_s: float, stall_s: float, outage_s: float, mtti_s: float) -> float:
    """Return ETTR, exact where the assumptions hold: T / (M e^(outage/M) (e^((T+d)/M) - 1)).

    Interruptions may strike during restarts and checkpoints as well; the last checkpoint is what
    is returned to. Source: Daly 2006.

    Args:
        interval_s: training between two checkpoints, > 0.
        stall_s: what one checkpoint keeps training waiting.
        outage_s: D + R, from the interruption to the first step.
        mtti_s: mean time between interruptions; inf for none.
    """
    _require(interval_s=interval_s, mtti_s=mtti_s, outage_s=outage_s, stall_s=stall_s)
    if mtti_s == inf:
        return interval_s / (interval_s + stall_s)
    exponent = (interval_s + stall_s) / mtti_s
    if exponent + outage_s / mtti_s > _EXPONENT_MAX:
        return 0.0
    return interval_s / mtti_s / (exp(outage_s / mtti_s) * expm1(exponent))


def small_loss_ettr(*, interval_s: float, stall_s: float, outage_s: float, mtti_s: float) -> float:
    """Return 1 - d/T - (outage + T/2)/M, good while the losses are small; never below zero."""
    _require(interval_s=interval_s, mtti_s=mtti_s, outage_s=outage_s, stall_s=stall_s)
    return max(1 - stall_s / interval_s - (outage_s + interval_s / 2) / mtti_s, 0.0)


def expected_ettr(*, interval_s: float, stall_s: float, outage_s: float, mtti_s: float) -> float:
    """Return (1 - (u0 + T/2)/M) / (1 + d/T), u0 being the outage; never below zero.

    Source: Meta's E[ETTR], arXiv 2410.21680, with 1/M = nodes x failures per node and second.
    """
    _require(interval_s=interval_s, mtti_s=mtti_s, outage_s=outage_s, stall_s=stall_s)
    spent = (outage_s + interval_s / 2) / mtti_s
    return max(1 - spent, 0.0) / (1 + stall_s / interval_s)


def outage_allowed_s(target: float, mtti_s: float) -> Seconds:
    """Return what an interruption may cost all in, D + R + T/2, for an ETTR of `target`.

    Saving is taken to be free; M (1 - target).
    """
    if not 0 <= target <= 1:
        raise ValueError(f"target is {target:g}, expected 0 to 1")
    _require(mtti_s=mtti_s)
    return Seconds(mtti_s * (1 - target))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outages:
    """Interruptions of one class within a window, and what each of them costs in seconds."""

    count: float
    detect_s: float = 0.0
    localise_s: float = 0.0
    restart_s: float = 0.0
    lost_work_s: float = 0.0

    @property
    def cost_s(self) -> float:
        """What all of them cost together."""
        each = self.detect_s + self.localise_s + self.restart_s + self.lost_work_s
        return self.count * each


def budget_ettr(
    outages: Iterable[Outages], *, window_s: float, interval_s: float, stall_s: float
) -> float:
    """Return ETTR where every class of interruption has costs of its own; never below zero.

    Lost work is given per class, since an SDC costs more of it than half an interval.
    """
    _require(window_s=window_s, interval_s=interval_s, stall_s=stall_s)
    training_s = window_s - sum(each.cost_s for each in outages)
    return max(training_s / window_s, 0.0) / (1 + stall_s / interval_s)


def spares_poisson(*, removals_per_day: float, out_s: float, quantile: float = 0.99) -> int:
    """Return how many nodes are out of service at once, at most, for `quantile` of the time.

    Raises ValueError if more than OUT_MAX are on average.

    Nodes leave independently; how long each is away matters by its mean alone (M/G/inf), so that
    the number away is Poisson with mean rate x `out_s`.

    >>> [spares_poisson(removals_per_day=6.1, out_s=h * 3600) for h in (4, 12, 72, 168)]
    [4, 8, 29, 59]
    """
    _require(removals_per_day=removals_per_day, out_s=out_s)
    mean = removals_per_day * out_s / DAY_S
    if mean > OUT_MAX:
        raise ValueError(f"{mean:.3g} nodes are out on average, expected at most {OUT_MAX:g}")
    return poisson_quantile(mean, quantile)


class Leaving(NamedTuple):
    """Faults that each take so many nodes out of service at once."""

    nodes: int
    per_day: float
    out_s: float
    """Mean time after which those of one fault are back, together."""


def spares_together(leaving: Iterable[Leaving], *, most: int, quantile: float = 0.99) -> int:
    """Return how many nodes are out of service at once, at most, for `quantile` of the time.

    A switch, a line of power or a neighbour takes several nodes at once, and they come back at
    once. Such faults are independent of each other, each present for a time that matters by its
    mean alone (M/G/inf), so of those that take k nodes there are as many as Poisson says with mean
    m_k = rate x time out, and the nodes away are N = sum of k x Poisson(m_k), a compound Poisson
    with mean sum of k m_k and variance sum of k^2 m_k. Its masses follow from each other:
    p_0 = exp(-sum of m_k), n p_n = sum of k m_k p_(n-k). With k = 1 alone it is `spares_poisson`.

    Source: that N is compound Poisson, own derivation from M/G/inf; the recursion is Panjer's
    (1981, Recursive evaluation of a family of compound distributions). Cost: `most` times the
    number of sizes at the worst, a ms for thousands of nodes.

    Args:
        leaving: by how many nodes a fault takes, in any order.
        most: nodes that there are; no more are ever out.
        quantile: in (0, 1).

    Raises:
        ValueError: for what can not be.

    >>> [spares_together([Leaving(1, n, DAY_S)], most=2048) for n in (1.0, 25.0)]
    [4, 37]
    >>> spares_together([Leaving(1, 9.0, DAY_S), Leaving(16, 1.0, DAY_S)], most=2048)
    73
    """
    _require_share(quantile=quantile)
    cumulated = _away(leaving, most)
    return next((n for n, share in enumerate(cumulated) if share >= quantile), most)


def spares_all_along(
    leaving: Iterable[Leaving], *, days: float, most: int, probability: float = 0.9
) -> int:
    """Return how many spares are never too few in so many days, with `probability` or more.

    Of N, which `spares_together` explains, s are too few at some time if they are at the beginning,
    or if a fault takes N from s or less to more than s. Of the latter there are on average
    days x sum over k of rate_k P(s - k < N <= s), since faults come whatever N is. With both added
    up, the probability of too few is no less: it is bounded, as that of any of several is by their
    sum. So the true one is smaller, the more so as one bad week has several such moments.

    Source: own derivation, Boole's and Markov's inequalities.

    Args:
        leaving: by how many nodes a fault takes, in any order.
        days: length of the run.
        most: nodes that there are; no more are ever out.
        probability: in (0, 1).

    Raises:
        ValueError: as `spares_together` does.

    >>> spares_all_along([Leaving(1, 6.5, 93 * 3600.0)], days=54, most=2048)
    44
    """
    _require_share(probability=probability)
    _require(days=days)
    known = tuple(leaving)
    cumulated = _away(known, most)

    def at_most(nodes: int) -> float:
        return cumulated[min(nodes, len(cumulated) - 1)] if nodes >= 0 else 0.0

    def risk(spares: int) -> float:
        per_day = sum(
            each.per_day * (at_most(spares) - at_most(spares - each.nodes)) for each in known
        )
        return 1.0 - at_most(spares) + days * per_day

    return next((n for n in range(len(cumulated)) if risk(n) <= 1 - probability), most)


def _away(leaving: Iterable[Leaving], most: int) -> list[float]:
    """Return the probability that at most n nodes are out, for n from 0 until it is all but one.

    At most up to n = `most`.
    """
    means: dict[int, float] = {}
    for nodes, per_day, out_s in leaving:
        if nodes < 1:
            raise ValueError(f"a fault takes {nodes} nodes, expected 1 or more")
        _require(per_day=per_day, out_s=out_s)
        means[nodes] = means.get(nodes, 0.0) + per_day * out_s / DAY_S
    pulls = [(nodes, nodes * mean) for nodes, mean in sorted(means.items()) if mean]
    # Masses are in units of exp(log_unit): the first of many faults is no number of a double.
    masses, log_unit = [1.0], -sum(means.values())
    reached = [exp(log_unit)]
    total = 1.0
    while reached[-1] < _ALL_BUT_ONE and len(masses) <= most:
        n = len(masses)
        masses.append(sum(pull * masses[n - nodes] for nodes, pull in pulls if nodes <= n) / n)
        total += masses[n]
        if total > _LARGE:
            masses, total = [mass / _LARGE for mass in masses], total / _LARGE
            log_unit += log(_LARGE)
        reached.append(min(total * exp(log_unit), 1.0))
    return reached


def poisson_quantile(mean: float, quantile: float) -> int:
    """Return how many of what happens `mean` times on average happen, at most, with a probability.

    Raises ValueError if the probability is not in (0, 1).

    >>> poisson_quantile(0.106, 0.999)
    2
    """
    if mean == 0:
        return _smallest(quantile, lambda _: 0.0, 0.0)
    return _smallest(quantile, lambda k: k * log(mean) - mean - lgamma(k + 1), mean)


def spares_binomial(*, machines: int, probability: float, quantile: float = 0.99) -> int:
    """Return how many of `machines` fail at once, at most, with probability `quantile`.

    Source: ByteRobust, arXiv 2509.16293, Table 5. Its published sizes (128, 256, 512 and 1,024
    machines need 2, 2, 3 and 4) follow from any probability between 0.117 % and 0.125 %.

    Args:
        machines: machines of the job, >= 0.
        probability: that a given machine is among those that fail at the same time, in [0, 1].
        quantile: in (0, 1).
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability is {probability:g}, expected 0 to 1")
    if machines < 0:
        raise ValueError(f"machines is {machines}, expected 0 or more")
    if machines == 0 or probability == 0:
        return _smallest(quantile, lambda _: 0.0, 0.0)
    if probability == 1:
        return machines

    def log_mass(k: int) -> float:
        if k > machines:
            return -inf
        ways = lgamma(machines + 1) - lgamma(k + 1) - lgamma(machines - k + 1)
        return ways + k * log(probability) + (machines - k) * log1p(-probability)

    return min(_smallest(quantile, log_mass, machines * probability), machines)


def _smallest(quantile: float, log_mass: Callable[[int], float], mean: float) -> int:
    """Return the smallest k of which the masses 0..k sum to the quantile.

    Masses further from the mean than any quantile in a double are passed over: they would take
    long and add nothing. The variance must not exceed the mean.
    """
    _require_share(quantile=quantile)
    reach = 40 * sqrt(mean) + 40
    first, last = max(0, int(mean - reach)), int(mean + reach)
    reached = 0.0
    for k in range(first, last):
        reached += exp(log_mass(k))
        if reached >= quantile:
            return k
    return last


def _require_share(**given: float) -> None:
    for name, value in given.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value:g}, expected more than 0 and less than 1")


def _require(**given: float) -> None:
    """Refuse what is no length of time: lengths that are divided by must be more than zero."""
    for name, value in given.items():
        least = "more than 0" if name in _DIVISORS else "0 or more"
        finite = isfinite(value) or (value == inf and name == "mtti_s")
        if not finite or value < 0 or (value == 0 and name in _DIVISORS):
            raise ValueError(f"{name} is {value:g}, expected {least}")


_DIVISORS = frozenset({"mtti_s", "interval_s", "window_s"})
