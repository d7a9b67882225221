"""Has ranks compute another rank's micro-batch once more: how often, and what it vouches for.

A wrong product on one rank is in the sum of all gradients, and so in every replica: comparing
replicas can not see it. Computing it again elsewhere does. Every so many steps each rank computes
the last micro-batch of the rank `shift` further on, from weights that are the same everywhere, and
the digests of both are compared before the step moves anything. `trainer.blame` says who was wrong.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from trainer.shares import Share

HALF = 1 << 32
LONGEST, COSTS = 4, 3
"""Replays that cost more than their share come more rarely, by so many times at most; what they
cost is known once so many were seen."""


def halves(digests: Tensor) -> Tensor:
    """Return int64 digests as pairs of float64, which hold 32 bits exactly."""
    low = digests & (HALF - 1)
    high = (digests >> 32) & (HALF - 1)
    return torch.stack((low, high), -1).double().flatten()


def split(digest: int) -> tuple[float, float]:
    """Return a digest in [0, 2**64) as `halves` does."""
    return float(digest % HALF), float(digest // HALF)


def joined(low: float, high: float) -> int:
    """Return the digest that went over as two float64."""
    return int(high) * HALF + int(low)


def every(time_share: float, work: Share, stages: int = 1) -> int:
    """Return after how many steps it is done again, to take that share of the time.

    A replay is one micro-batch more for every rank, as long as nobody knows better; of a pipeline
    it goes through all stages, with nothing beside it, and a step fills the pipeline first. What a
    rank has itself may be fewer than what others have, and all of them must come to the same
    number: they wait for each other in it.
    """
    return max(math.ceil(stages / (time_share * (work.most + stages - 1))), 1)


class Pace:
    """After how many steps replays come, from what they were seen to cost.

    Args:
        share: of the time of a step, that they may take.
        work: of any rank.
        stages: through which a micro-batch goes, one after the other.
        watched: whether they come in every step in this generation, whatever they take.

    Attributes:
        every: so many steps.
        longest: never more than so many, whatever they cost, in any generation of the run.
        fixed: whether that stays as it is, as it does if they may take all the time they want.
    """

    def __init__(
        self, share: float, work: Share, stages: int = 1, *, watched: bool = False
    ) -> None:
        self._least = every(share, work, stages)
        self.every = 1 if watched else self._least
        # Also of a generation in which all was looked at: the one before it may not have been.
        self.longest = LONGEST * self._least
        self.fixed = watched or share >= 1
        self._share = share
        self._costs: deque[float] = deque(maxlen=COSTS)

    def paid(self, costs: Sequence[float]) -> None:
        """Hear what a replay cost each rank, in steps; 0 of who does not know.

        Who came first has waited for the others, in what it takes for its cost: the least is true.
        All ranks hear the same, and so come to the same.
        """
        if self.fixed or not costs or min(costs) <= 0:
            return
        self._costs.append(min(costs))
        if len(self._costs) == COSTS:
            wanted = math.ceil(median(self._costs) / self._share)
            self.every = min(max(wanted, self._least), self.longest)


def known_good(restored: int, longest: int) -> int:
    """Return the last step that a replay vouches for, of a world that was restored to a step.

    What it was restored to was saved after the last replay before it, and nobody has looked since.

    Args:
        restored: the step.
        longest: the most steps that may lie between two replays.

    >>> known_good(150, 40)
    109
    """
    return max(restored - longest - 1, 0)


def of_itself(rows: Sequence[Sequence[object]], how: str = "computed") -> str:
    """Say why replays mean nothing here; "" if they do.

    A device that errs at times differs from itself, too, but hardly more than half of them do.

    Args:
        rows: of each rank, digests of its own micro-batch, computed once more, and again.
        how: the word for what was done.
    """
    differ = sum(first != second for first, second in rows)
    if 2 * differ <= len(rows):
        return ""
    return (
        f"on {differ} of {len(rows)} ranks the same micro-batch comes out otherwise each time that "
        f"it is {how}: what differs elsewhere shows nothing"
    )
