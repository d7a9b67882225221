"""How fast the processor is that a rank computes on: a product of matrices, a copy of memory.

A device that is shared, throttled or broken shows in how much it gets done in a stretch of time. A
stretch covers many periods of whatever interrupts it; the best of some counts, since what disturbs
once is no property of the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from orchestrator.protocol.rank import Speed

SIZE = 192
"""Of the matrices: a product takes a fraction of a millisecond, and stays in the cache."""
COPIED_BYTES = 8 << 20
"""More than what most caches of one core hold."""
STRETCHES = 2
COMPUTING, COPYING = 0.3, 0.12
"""Of the time there is, what each stretch takes."""


def measure(within_s: float) -> Speed:
    """Return how fast this processor is; takes less than `within_s` seconds."""
    left = np.full((SIZE, SIZE), 0.5, np.float32)
    right, product = left.copy(), np.empty_like(left)
    source = np.ones(COPIED_BYTES // 8)
    target = np.empty_like(source)
    return Speed(
        operations=rate(lambda: np.matmul(left, right, out=product), COMPUTING * within_s)
        * 2
        * SIZE**3,
        copied=rate(lambda: np.copyto(target, source), COPYING * within_s) * COPIED_BYTES,
    )


def rate(work: Callable[[], object], stretch_s: float) -> float:
    """Return how often per second something can be done: the best of some stretches of time."""
    work()  # the first time touches memory that nobody has touched
    best = 0.0
    for _ in range(STRETCHES):
        begun = time.monotonic()
        done = 0
        while (spent_s := time.monotonic() - begun) < stretch_s:
            work()
            done += 1
        best = max(best, done / spent_s)
    return best
