"""Notices when the loss jumps, and when it is back: a line in the log of rank 0 for each."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

STEPS = 100
"""What a loss is compared with: so many before it."""
STEPS_MIN = 20
"""With fewer there is nothing to compare with yet."""
SPREADS = 8.0
SHARE_MIN = 0.1
"""A spike is above the median by so many spreads, and by this share of it. Own rule: 8 spreads are
never reached by noise, and a run that has all but converged has next to no spread."""
_NORMAL = 1.4826
"""Standard deviations of normal noise in its median absolute deviation."""


class Spikes:
    """Looks at the losses of a run, one after the other; knows nothing of those before it began."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=STEPS)
        self._began = 0
        """Step at which the spike under way began; 0 for none."""

    def observe(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Return a line for the log if a spike begins or ends with this step, else None."""
        if len(self._recent) < STEPS_MIN:
            if math.isfinite(loss):
                self._recent.append(loss)
            return None
        usual = median(self._recent)
        spread = _NORMAL * median(abs(other - usual) for other in self._recent)
        limit = usual + max(SPREADS * spread, SHARE_MIN * abs(usual))
        if loss <= limit:
            self._recent.append(loss)
            began, self._began = self._began, 0
            steps = step - began
            return f"step {step}: loss is back at {loss:.4f} after {steps} steps" if began else None
        if not self._began:
            self._began = step
            return (
                f"step {step}: loss spikes to {loss:.4f}, the median of {len(self._recent)} steps "
                f"before is {usual:.4f}, limit {limit:.4f}; gradient norm {grad_norm:.4g}"
            )
        if step - self._began == STEPS:
            self._recent.clear()
            self._began = 0
            return f"step {step}: loss has stayed high for {STEPS} steps, {loss:.4f} is usual now"
        return None
