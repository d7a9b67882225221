"""What others look at, on the same steps: rules over losses, norms and hashes of weights.

They are here to be compared with, and say at which step of a trial they would have spoken up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.protocol.trials import StepRow

FIRST, TIMES = 100, 10.0
WINDOW, SIGMAS = 128, 6.0
WINDOW_MIN = 2


class Seen(NamedTuple):
    """What a step looks like from outside: one row for each rank."""

    of_ranks: tuple[StepRow, ...]

    @property
    def loss(self) -> float:
        """Of the global batch; not a number if it is not finite."""
        return _number(self.of_ranks[0].loss)

    @property
    def grad_norm(self) -> float:
        """Of the sum over all ranks, as the first rank has it."""
        return _number(self.of_ranks[0].grad_norm)


def not_finite(before: Sequence[Seen], step: Seen) -> bool:
    """A loss or a norm is infinite or no number: what every trainer looks at."""
    del before
    return not (math.isfinite(step.loss) and math.isfinite(step.grad_norm))


def ten_times(before: Sequence[Seen], step: Seen) -> bool:
    """The loss is over ten times the largest of the first hundred. Source: Megatron-LM."""
    return step.loss > TIMES * max((s.loss for s in before[:FIRST]), default=math.inf)


def six_sigma(before: Sequence[Seen], step: Seen) -> bool:
    """Loss or norm exceeds the mean of 128 steps by six deviations. Source: OLMo-core.

    Every step becomes part of the window, whatever it was like.
    """
    window = before[-WINDOW:]
    if len(window) < WINDOW_MIN:
        return False
    return _outside([s.loss for s in window], step.loss) or _outside(
        [s.grad_norm for s in window], step.grad_norm
    )


def replica_hash(before: Sequence[Seen], step: Seen) -> bool:
    """Replicas have other weights than each other after the step. Source: Megatron-LM's option.

    It compares all ranks: the run of a campaign has one shard.
    """
    del before
    return len({row.weights for row in step.of_ranks}) > 1


BASELINES = {
    "not finite": not_finite,
    "10x spike": ten_times,
    "6 sigma, 128 steps": six_sigma,
    "hash of replicas": replica_hash,
}


def flagged(before: Sequence[Seen], steps: Sequence[Seen]) -> dict[str, int | None]:
    """Return for each baseline the first of some steps at which it speaks up, None if it does not.

    Args:
        before: the steps that led to them, from the first of the run.
        steps: in order.
    """
    found: dict[str, int | None] = dict.fromkeys(BASELINES)
    known = [*before]
    for step in steps:
        for name, rule in BASELINES.items():
            if found[name] is None and rule(known, step):
                found[name] = step.of_ranks[0].step
        known.append(step)
    return found


def _outside(window: Sequence[float], value: float) -> bool:
    mean = math.fsum(window) / len(window)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in window) / (len(window) - 1))
    return value > mean + SIGMAS * deviation


def _number(value: float | None) -> float:
    return math.nan if value is None else value
