"""How fast the processor is that a rank computes on: a product of matrices, a copy of memory.

A device that is throttled or broken shows in how much it gets done in a second that it spends on
it, one that is stopped or shared in a second of the wall clock. Other ranks and other programs may
want the same cores meanwhile; that they take turns must not look like a slow device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from orchestrator.protocol.rank import Speed

SIZE = 192
"""Of the matrices: a product takes a fraction of a millisecond, and stays in the cache."""
COPIED_BYTES = 8 << 20
"""More than what most caches of one core hold."""
SHARE = 0.84
"""Of the time there is, what measuring takes."""
COMPUTING_S, COPYING_S = 0.02, 0.005
"""Processor time of a round. One of products covers some periods of whatever throttles a device, or
half of them might see nothing of that, and the median of them counts. The best of the others does:
memory is the whole machine's, and other programs leave less of it at most times."""


class Work:
    """Something that is done over and over, and how long that took.

    Args:
        do: does it once.
        round_s: processor time of a round.
    """

    def __init__(self, do: Callable[[], object], round_s: float) -> None:
        self._do, self._round_s = do, round_s
        self._done, self._took_s = 0, 0.0
        self.rounds: list[float] = []
        """How often per second of processor time it was done, in each round."""
        do()  # the first time touches memory that nobody has touched

    def round(self, until_s: float) -> None:
        """Do it for a round, or until then if that is sooner."""
        begun, begun_s, count = time.monotonic(), time.thread_time(), 0
        while True:
            self._do()
            count += 1
            busy_s = time.thread_time() - begun_s
            if busy_s >= self._round_s or (busy_s > 0 and time.monotonic() >= until_s):
                break
        self.rounds.append(count / busy_s)
        self._done += count
        self._took_s += time.monotonic() - begun

    @property
    def elapsed(self) -> float:
        """How often per second of the wall clock, in all rounds together."""
        return self._done / self._took_s


def measure(within_s: float) -> Speed:
    """Return how fast this processor is; takes less than `within_s` seconds."""
    left = np.full((SIZE, SIZE), 0.5, np.float32)
    right, product = left.copy(), np.empty_like(left)
    source = np.ones(COPIED_BYTES // 8)
    target = np.empty_like(source)
    products = Work(lambda: np.matmul(left, right, out=product), COMPUTING_S)
    copies = Work(lambda: np.copyto(target, source), COPYING_S)
    in_turn([products, copies], SHARE * within_s)
    operations = 2 * SIZE**3
    return Speed(
        operations=products.elapsed * operations,
        copied=copies.elapsed * COPIED_BYTES,
        busy_operations=median(products.rounds) * operations,
        busy_copied=max(copies.rounds) * COPIED_BYTES,
    )


def in_turn(works: Sequence[Work], within_s: float) -> None:
    """Do rounds of some work in turn for so many seconds, at least one of each."""
    until_s = time.monotonic() + within_s
    while True:
        for work in works:
            work.round(until_s)
        if time.monotonic() >= until_s:
            return
