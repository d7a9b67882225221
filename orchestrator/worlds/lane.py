"""Has work done one piece after the other, and leaves behind what hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LEFT_MAX = 4
"""Pieces of work that hang at a time; while there are so many, none is begun."""


class Lane:
    """Work in the order in which it was asked for, a piece at a time.

    A call to a file system that does not answer returns when it likes, and can not be interrupted.
    So what is not done in time is left to its thread, and the next piece gets another one.

    Args:
        name: of the threads.
        limit_s: seconds that each piece has, from when it was asked for.
    """

    def __init__(self, name: str, limit_s: float) -> None:
        self._name, self._limit_s = name, limit_s
        self._room = threading.BoundedSemaphore(LEFT_MAX)
        self._lock = threading.Lock()
        self._last = threading.Event()
        self._last.set()

    def submit(self, work: Callable[[], None], late: Callable[[], None]) -> None:
        """Do a piece of work once all before it is over; returns at once. From any thread.

        Args:
            work: what is to be done. It answers for its own errors.
            late: called instead of waiting on, if it is not done in time, or not even begun.
        """
        over = threading.Event()
        deadline = time.monotonic() + self._limit_s
        with self._lock:
            before, self._last = self._last, over

        def see_to_it() -> None:
            try:
                if not (before.wait(_left(deadline)) and self._done(work, deadline)):
                    late()
            finally:
                over.set()

        threading.Thread(target=see_to_it, name=self._name, daemon=True).start()

    def latest(self) -> threading.Event:
        """Return what is set when all that was asked for so far is done, or late."""
        with self._lock:
            return self._last

    def _done(self, work: Callable[[], None], deadline: float) -> bool:
        if not self._room.acquire(timeout=_left(deadline)):
            return False

        def do() -> None:
            try:
                work()
            finally:
                self._room.release()

        worker = threading.Thread(target=do, name=f"{self._name}-work", daemon=True)
        worker.start()
        worker.join(_left(deadline))
        return not worker.is_alive()


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)
