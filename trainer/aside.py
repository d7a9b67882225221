"""Reads in a thread beside the step, since a disk may keep whoever asks it, for ever.

Who waits for it shows signs of life meanwhile; nobody waits for the thread when a rank ends.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from trainer.prefetch import DataStalledError

T = TypeVar("T")
_LOOK_S = 0.05
"""Who waits shows a sign of life this often."""


class Asked(Generic[T]):
    """What is read for somebody.

    Args:
        read: does it.
    """

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._found: list[T] = []
        self._error: Exception | None = None
        self._done = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether it is not over yet."""
        return not self._done.is_set()

    def over(self, alive: Callable[[], None], within_s: float) -> bool:
        """Wait for it, but no longer than some seconds; return whether it is over.

        Args:
            alive: is called now and then meanwhile; may raise.
            within_s: how long.
        """
        deadline = time.monotonic() + within_s
        while self.busy and time.monotonic() < deadline:
            alive()
            self._done.wait(_LOOK_S)
        return not self.busy

    def result(self) -> T:
        """Return what was read.

        Raises:
            DataStalledError: if it is not over.
            Exception: what reading raised.
        """
        if self.busy:
            raise DataStalledError("samples that are read once more did not come")
        if self._error is not None:
            raise self._error
        return self._found[0]

    def run(self) -> None:
        """Read."""
        try:
            self._found.append(self._read())
        except Exception as error:  # noqa: BLE001 - raised again where it is asked for
            self._error = error
        self._done.set()


class Aside:
    """Reads what it is asked for, in order. The thread begins with the first, and ends with it."""

    def __init__(self) -> None:
        self._orders: SimpleQueue[Asked[Any] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, read: Callable[[], T]) -> Asked[T]:
        """Have something be read; return what can be waited for."""
        asked = Asked(read)
        if self._thread is None:
            # One for all steps: to start a thread took 1.5 ms of a step of 100 on busy cores.
            self._thread = threading.Thread(
                target=_read_all, args=(self._orders,), name="readings", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._orders.put, None)
        self._orders.put(asked)
        return asked


def _read_all(orders: SimpleQueue[Asked[Any] | None]) -> None:
    while (order := orders.get()) is not None:
        order.run()
        del order  # or it would keep its reader alive, which ends this thread when it goes
