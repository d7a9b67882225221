"""How far a world has trained: a function of time, not a loop over steps."""

from __future__ import annotations

from orchestrator.protocol.ids import Seconds, Step
from orchestrator.worlds.simulated.agenda import NEVER

_ROUNDING = 1e-9
"""Of a step; what floating point may leave of a whole one."""


class Pace:
    """Steps of one generation, done at a speed that may change.

    Args:
        at: when `step` was done.
        step: steps done by then.
        last: the last one.
        step_s: seconds for each.
    """

    def __init__(self, at: Seconds, step: Step, last: Step, step_s: float) -> None:
        self._at, self._done, self.last = at, float(step), last
        self._step_s = step_s
        self.usual_s = step_s
        """Seconds for a step while nothing holds it up."""

    def change(self, at: Seconds, step_s: float) -> None:
        """Go on from `at` with another number of seconds for a step; infinite to stand still."""
        self._done = self.progress(at)
        self._at, self._step_s = at, step_s
        if step_s < NEVER:
            self.usual_s = step_s

    def done(self, at: Seconds) -> Step:
        """Return the steps that are complete at a moment."""
        return Step(min(int(self.progress(at) + _ROUNDING), self.last))

    def moment(self, step: Step) -> Seconds:
        """Return when a step is complete at the present speed; never, if it stands still."""
        left = step - self._done
        if left <= 0:
            return self._at
        return NEVER if self._step_s == float("inf") else Seconds(self._at + left * self._step_s)

    def since(self, at: Seconds) -> float:
        """Return how long ago the last step was complete, seconds."""
        begun = self.progress(at) - self.done(at)
        if self._step_s == NEVER:
            return max(begun, 0.0) * self.usual_s + at - self._at
        if self.done(at) == self.last:
            return max(at - self.moment(self.last), 0.0)
        return max(begun, 0.0) * self._step_s

    def progress(self, at: Seconds) -> float:
        """Return the steps done at a moment, the one under way as a fraction."""
        if self._step_s == float("inf"):
            return self._done
        return min(self._done + max(at - self._at, 0.0) / self._step_s, float(self.last))
