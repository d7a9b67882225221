"""How long this process waits for its peers, so that what is left of a step is its own computing.

A collective makes every rank as slow as the slowest: the time of a step is the same everywhere and
names nobody. What differs is who computes, and who waits for whom.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist


class Waited:
    """Seconds that collectives kept this process, since it was made.

    On a GPU a wait is put into a queue of the device and returns at once; nothing is counted.
    """

    def __init__(self) -> None:
        self.seconds = 0.0


_waited = Waited()
_wait = dist.Work.wait


def _timed(work: dist.Work, *args: Any, **named: Any) -> bool:  # noqa: ANN401 - whatever it takes
    begun = time.monotonic()
    try:
        return _wait(work, *args, **named)
    finally:
        _waited.seconds += time.monotonic() - begun


def count() -> Waited:
    """Count waits of all collectives of this process from now on; return the count.

    Sharding, pipelines and whoever calls `torch.distributed` wait here, and only here: there is no
    other place to count all of them.
    """
    dist.Work.wait = _timed  # type: ignore[assignment, method-assign]
    return _waited
