"""How often to save: where a save costs as much as the work that it keeps from being lost.

Daly's interval, for each tier apart: what memory has serves after nearly every interruption, the
durable tier only where memory is gone, too. To first order the two do not depend on each other
(Benoit et al., "Towards optimal multi-level checkpointing", IEEE Transactions on Computers 2017).

What a save costs is the time for which it kept training waiting, as it was measured. The rate of
interruptions is the mean of what is to be believed after n of them in t seconds since the first
step. Before, it was believed to be that of the fault model, for a run of this many nodes; or ten
times as high, with a hundredth of the weight; or a hundred times, with a hundredth of that; and so
on, each of these (1/b) as the mean of an exponential distribution. Then the weight of each is

    w b / (b + t)^(n + 1)    and the mean that it comes to    (1 + n) / (b + t)

so a run that is never interrupted saves less and less often, one that is interrupted as others are
is hardly taken for worse by the first time, and one that is much worse is soon seen to be. Of the
durable tier likewise, for those interruptions after which memory was of no use.
"""

from __future__ import annotations

from math import ceil, exp, floor, fsum, log
from typing import NamedTuple

from orchestrator.core.plans import Pace
from orchestrator.core.state import RunState
from orchestrator.policy.arithmetic import DAY_S, daly_interval_s
from orchestrator.protocol.cadence import STEPS_MAX, Cadence
from orchestrator.protocol.runfile import seconds

PER_NODE_DAY, PER_JOB_DAY = 0.00322, 1.167
"""Interruptions by each node of eight GPUs, and by the software of the job, in a day.

Source: the fault model of Llama 3's run (orchestrator/faults/data/llama3.yaml).
"""
DEEP_SHARE = 0.04
"""Of them, so many take a node and the one that keeps its copies, or ask for a state that memory
does not have: 3 to 5 % of failures are of several nodes (arXiv 2410.21680)."""
DECADES = 4
"""Rates are believed in up to a thousand times the fault model's."""
SAVES_MIN, STEPS_MIN = 3, 10
"""Nothing is said before so many saves and steps were seen."""
CHANGE = 1.25
"""An interval stays until another one is better by this factor: at that distance from the best, the
sum of stalls and lost work is 2.5 % more than it could be."""
WRITE_SHARE = 0.5
"""Of the time, a checkpoint may be on its way to the durable tier: what is late for the next one
holds the slots that saves to memory need."""

_ROUNDING = 1e-9
_SECONDS_MOST = 3600.0


def rates(state: RunState) -> tuple[float, float]:
    """Return how many interruptions there are in a second, and how many that memory is lost in."""
    seen, nodes = state.experience, state.run.spec.nodes.count
    watched_s = 0.0 if seen.since is None else state.now - seen.since
    prior = (PER_JOB_DAY + nodes * PER_NODE_DAY) / DAY_S
    return (
        mean_rate(prior, seen.interruptions, watched_s),
        mean_rate(prior * DEEP_SHARE, seen.deep, watched_s),
    )


def mean_rate(prior: float, seen: int, watched_s: float) -> float:
    """Return the mean of what is believed of a rate (see above).

    Args:
        prior: rate of the fault model, 1/s.
        seen: interruptions.
        watched_s: in so many seconds.

    >>> round(1 / mean_rate(1 / 72_000, 0, 0.0)), round(1 / mean_rate(1 / 72_000, 3, 600.0))
    (65461, 548)
    """
    scales_s = [1 / (prior * 10**decade) for decade in range(DECADES)]
    # Relative to the largest term: powers of months underflow.
    log_weights = [
        -decade * log(100) + log(b) - (seen + 1) * log(b + watched_s)
        for decade, b in enumerate(scales_s)
    ]
    weights = [exp(each - max(log_weights)) for each in log_weights]
    means = [(1 + seen) / (b + watched_s) for b in scales_s]
    return fsum(w * mean for w, mean in zip(weights, means, strict=True)) / fsum(weights)


def cadence(state: RunState) -> Pace | None:
    """Say how often to save from now on; None while it is good as it is, or not enough is known."""
    seen, step_s = state.experience, state.step_times.quantile(0.5)
    if seen.saves < SAVES_MIN or state.step_times.known < STEPS_MIN or step_s <= 0:
        return None
    every = state.run.spec.checkpoint
    rate, deep = rates(state)
    # The least of what was seen: others may have been told of late, while nothing else happened.
    copy_s, write_s = min(seen.copy_s, default=0.0), min(seen.write_s, default=0.0)
    memory_s = max(daly_interval_s(seen.stall_mean_s, 1 / rate), copy_s)
    bounds = _Bounds(seconds(every.memory_every_min), seconds(every.memory_every_max))
    memory = bounds.steps(memory_s, step_s)
    durable_s = max(daly_interval_s(seen.stall_mean_s, 1 / deep), write_s / WRITE_SHARE)
    durable_bounds = _Bounds(seconds(every.every_min), seconds(every.every_max))
    # Of a multiple nothing is staged that would not be staged anyway.
    durable = memory * durable_bounds.steps(durable_s, memory * step_s)
    best = Cadence(memory, min(durable, STEPS_MAX))
    if not _better(state.cadence, best):
        return None
    reason = (
        f"memory every {best.memory} steps ({memory * step_s:.1f} s{bounds.word(memory_s)}): "
        f"a save stalls {seen.stall_mean_s * 1e3:.1f} ms and is copied in {copy_s:.1f} s, "
        f"{_told(rate, seen.interruptions)}; durable every {best.durable} steps "
        f"({best.durable * step_s:.1f} s{durable_bounds.word(durable_s)}): written in "
        f"{write_s:.1f} s, and of those that memory does not survive {_told(deep, seen.deep)}"
    )
    return Pace(cadence=best, reason=reason)


class _Bounds(NamedTuple):
    """Between which the user wants an interval, seconds."""

    least_s: float
    most_s: float

    def steps(self, wanted_s: float, unit_s: float) -> int:
        """Return the interval in units that is nearest to what is wanted; at least one."""
        most = max(min(floor(self.most_s / unit_s + _ROUNDING), STEPS_MAX), 1)
        least = min(ceil(self.least_s / unit_s - _ROUNDING), most)
        return min(max(round(wanted_s / unit_s), least, 1), most)

    def word(self, wanted_s: float) -> str:
        """Say which of the two it is that counts."""
        if wanted_s < self.least_s:
            return ", at least"
        return ", at most" if wanted_s > self.most_s else ""


def _better(now: Cadence, best: Cadence) -> bool:
    pairs = ((now.memory, best.memory), (now.durable, best.durable))
    return any(max(a, b) >= CHANGE * min(a, b) for a, b in pairs)


def _told(rate: float, seen: int) -> str:
    every_s = 1 / rate
    told = f"{every_s:.0f} s" if every_s < _SECONDS_MOST else f"{every_s / 3600:.1f} h"
    return f"one interruption in {told} ({seen} seen)"
