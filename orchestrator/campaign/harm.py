"""Whether a fault would have done harm if nobody had looked: compared with runs without any.

A run goes another way for the order in which it adds numbers up alone. A fault that leaves it
nearer to its twin than two clean runs are to each other does no harm that anybody could tell from
that; one that leaves it further off does, since no clean run was seen to get there.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from orchestrator.campaign.catalogue import MOMENTS
from orchestrator.campaign.judging import Result
from orchestrator.protocol.trials import Gap

STEPS = MOMENTS + 20
"""After a snapshot that a fault is followed for, so at least 20 from where it begins."""
CLEAN_RUNS = 9
"""That differ in the order of sums: 36 pairs, so that few of what does no harm are further apart
than all of them by chance."""


def widest(gaps: Sequence[Gap | None]) -> Gap:
    """Return the largest gap there is between clean runs, in either respect."""
    known = [gap for gap in gaps if gap is not None]
    return Gap(
        loss=max((gap.loss or 0.0 for gap in known), default=0.0),
        weights=max((gap.weights or 0.0 for gap in known), default=0.0),
    )


def told(result: Result, gaps: Sequence[Gap | None], clean: Gap) -> Result:
    """Return a result that says whether the fault did harm, with all ranks' gaps to the twin.

    The worst rank counts: a run is saved from whichever it may be.

    Args:
        result: of the trial.
        gaps: of each rank, after the same steps unwatched.
        clean: the largest between clean runs; if there is none, nothing can be told.
    """
    known = [gap for gap in gaps if gap is not None]
    if not (clean.loss and clean.weights):
        return result
    losses = [None if gap.loss is None else gap.loss / clean.loss for gap in known]
    weights = [None if gap.weights is None else gap.weights / clean.weights for gap in known]
    return msgspec.structs.replace(
        result,
        harmful=any(times is None or times > 1.0 for times in (*losses, *weights)),
        loss_gap=_worst(losses),
        weight_gap=_worst(weights),
    )


def _worst(times: Sequence[float | None]) -> float | None:
    """Return the largest number, None if one is not finite."""
    finite = [each for each in times if each is not None]
    return max(finite, default=None) if len(finite) == len(times) else None
