"""How fast the processor is that a rank computes on: a product of matrices, a copy of memory.

A device that is throttled or broken shows in how much it gets done in a second that it spends on
it, one that is stopped or shared in a second of the wall clock. Other ranks and other programs may
want the same cores meanwhile; that they take turns must not look like a slow device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import numpy as np

from orchestrator.protocol.rank import Speed

SIZE = 192
"""Of the matrices: a product takes a fraction of a millisecond, and stays in the cache."""
COPIED_BYTES = 8 << 20
"""More than what most caches of one core hold."""
COMPUTING, COPYING = 0.6, 0.24
"""Of the time there is, what each takes."""
ROUND_S = 0.02
"""Of processor time. The median of rounds counts: what disturbs once is no property of the device.
Each covers some periods of whatever slows it down, or a half of them might see nothing of that."""


class Rate(NamedTuple):
    """How often something could be done."""

    elapsed: float
    """Per second of the wall clock, of all the time that it took."""
    busy: float
    """Per second of processor time, the median of rounds."""


def measure(within_s: float) -> Speed:
    """Return how fast this processor is; takes less than `within_s` seconds."""
    left = np.full((SIZE, SIZE), 0.5, np.float32)
    right, product = left.copy(), np.empty_like(left)
    source = np.ones(COPIED_BYTES // 8)
    target = np.empty_like(source)
    products = rate(lambda: np.matmul(left, right, out=product), COMPUTING * within_s)
    copies = rate(lambda: np.copyto(target, source), COPYING * within_s)
    return Speed(
        operations=products.elapsed * 2 * SIZE**3,
        copied=copies.elapsed * COPIED_BYTES,
        busy_operations=products.busy * 2 * SIZE**3,
        busy_copied=copies.busy * COPIED_BYTES,
    )


def rate(work: Callable[[], object], stretch_s: float) -> Rate:
    """Return how often per second something can be done, tried for so many seconds."""
    work()  # the first time touches memory that nobody has touched
    begun, rounds, done = time.monotonic(), list[float](), 0
    while not rounds or time.monotonic() - begun < stretch_s:
        count, busy_s = _round(work, begun + stretch_s)
        rounds.append(count / busy_s)
        done += count
    return Rate(done / (time.monotonic() - begun), median(rounds))


def _round(work: Callable[[], object], until_s: float) -> tuple[int, float]:
    """Do something over and over; return how often, and the processor time that it took."""
    begun_s, count = time.thread_time(), 0
    while True:
        work()
        count += 1
        busy_s = time.thread_time() - begun_s
        if busy_s >= ROUND_S or (time.monotonic() >= until_s and busy_s > 0):
            return count, busy_s
