"""In how many steps something has its turn, so that it takes no more than its share of their time.

What it takes is measured, in processor time of the thread that takes the steps: it hardly depends
on who else is at work on the machine, nor on what ranks wait for. Ranks tell each other, since all
of them must look at the same things in the same steps, and so come to the same number.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from statistics import median_low

LONGEST = 8
"""What takes more than was expected comes more rarely, by so many times at most."""
STEPS_MIN = 16
"""Over which it is measured, at least."""
APART = 0.2
"""By which share of itself a number has to be wrong to be changed: it is measured with noise."""


class Turns:
    """Those of one kind of look.

    Args:
        share: of the time of steps, above 0; at 1, it is at every step, whatever it takes.
        first: steps from one turn to the next, as long as nobody knows what one takes.
        measured: whether this thread's time is what it takes; it is not where a GPU does it.

    Attributes:
        every: so many steps.
    """

    def __init__(self, share: float, first: int, *, measured: bool = True) -> None:
        self.every = 1 if share >= 1 else first
        self._share, self._longest = share, LONGEST * first
        self._fixed = share >= 1 or not measured
        self._cost = 0.0
        self._looking_s = self._steps_s = 0.0
        self._steps = 0

    @classmethod
    def fixed(cls, every: int) -> Turns:
        """Return turns that stay as they are."""
        return cls(0.5, every, measured=False)

    def settle(self) -> None:
        """Stay as it is from now on."""
        self._fixed = True

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Count what the block takes as looking."""
        begun = time.thread_time()
        yield
        self._looking_s += time.thread_time() - begun

    def stepped(self, seconds: float) -> None:
        """Hear that a step is over.

        Args:
            seconds: of this thread's processor time that it took, with what was looked at in it.
        """
        self._steps += 1
        self._steps_s += seconds
        turns = math.ceil(STEPS_MIN / self.every)
        if self._fixed or self._steps < turns * self.every:
            return
        others_s = max(self._steps_s - self._looking_s, 1e-6)
        self._cost = self._looking_s / turns / (others_s / self._steps)
        self._looking_s, self._steps_s, self._steps = 0.0, 0.0, 0

    def word(self) -> float:
        """Return what this rank tells the others: what a turn takes, in steps; 0 if not known."""
        cost, self._cost = self._cost, 0.0
        return cost

    def agree(self, costs: Sequence[float]) -> bool:
        """Hear what a turn takes each rank; return whether they come more rarely now, or less so.

        Args:
            costs: of all ranks, 0 of who does not know. Alike everywhere, and so is what follows.
        """
        known = [cost for cost in costs if cost > 0]
        if self._fixed or 2 * len(known) <= len(costs):
            return False
        wanted = max(math.ceil(min(median_low(known) / self._share, self._longest)), 1)
        if abs(wanted - self.every) <= APART * self.every:
            return False
        self.every = wanted
        self._looking_s, self._steps_s, self._steps = 0.0, 0.0, 0
        return True
