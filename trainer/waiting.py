"""How long this process waits for its peers, and in which collective.

A collective makes every rank as slow as the slowest: the time of a step is the same everywhere and
names nobody. What differs is who computes, and who waits for whom.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch.distributed as dist

from orchestrator.protocol.groups import ALL
from trainer import groups


class Counter(Protocol):
    """Who counts collectives."""

    def entered_collective(self, group: str | None = ALL, what: str = "") -> None:
        """Count one that is entered, of the group of that name, and what it is."""

    def left_collective(self, group: str | None = ALL) -> None:
        """Count one that is left."""


class Waited:
    """Waits of this process for collectives.

    On a GPU a wait is put into a queue of the device and returns at once: next to nothing is
    counted there.

    Attributes:
        seconds: how long they took since it was made.
        counter: who hears of each.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.counter: Counter | None = None
        self._on: dist.Work | None = None

    def enter(self, work: dist.Work) -> None:
        """Enter a collective; to wait on for one that it has entered is no other."""
        if self._on is not work:
            self._on = work
            if self.counter is not None:
                self.counter.entered_collective(groups.of(work), groups.asked(work))

    def leave(self) -> None:
        """Leave the collective that was entered."""
        work, self._on = self._on, None
        if self.counter is not None and work is not None:
            self.counter.left_collective(groups.of(work))


_waited = Waited()
_wait = dist.Work.wait


def _timed(work: dist.Work, *args: Any, **named: Any) -> bool:  # noqa: ANN401 - whatever it takes
    begun = time.monotonic()
    _waited.enter(work)
    try:
        done = _wait(work, *args, **named)
    finally:
        _waited.seconds += time.monotonic() - begun
    # Not after an error: a wait that only looked in between goes on, and one that failed is stuck.
    _waited.leave()
    return done


def count() -> Waited:
    """Count waits for all collectives of this process from now on; return the count.

    Sharding, pipelines and whoever calls `torch.distributed` wait here, and only here: there is no
    other place to count all of them. So do layers that are cut (`groups.wait_in_python`).
    """
    dist.Work.wait = _timed  # type: ignore[assignment, method-assign]
    return _waited
