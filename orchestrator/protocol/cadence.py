"""How often a run saves: to memory, and to the durable tier."""

from __future__ import annotations

import msgspec

STEPS_MAX = 1 << 40
"""As many as an interval may have; ranks tell each other such numbers as doubles, exactly."""


class Cadence(msgspec.Struct, frozen=True, array_like=True):
    """Intervals in steps. A save is due after each step that is a multiple of one of them."""

    memory: int
    durable: int

    def due(self, first: int, last: int) -> int:
        """Return how many steps from `first` to `last`, both included, are saved.

        >>> Cadence(2, 5).due(1, 10)  # 2, 4, 5, 6, 8 and 10
        6
        """
        if self.durable % self.memory == 0:
            return _multiples(self.memory, first, last)
        return sum(s % self.memory == 0 or s % self.durable == 0 for s in range(first, last + 1))


def _multiples(every: int, first: int, last: int) -> int:
    return max(last // every - (first - 1) // every, 0)
