"""A save whose copy is made beside what the program computes next, for programs that ask for it.

Nothing but an update writes to the state, so it can be copied beside forward and backward, if the
next update waits for that. Whether it did wait is all that tells a sound copy from one of two
steps: so a copy is handed over only when it is made *and* somebody has waited for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from orchestrator.worker.errors import MisconfiguredError
from orchestrator.worker.slot import Slot

Copy = Callable[[memoryview], object]
"""Copies the state into a slot's memory."""
Seal = Callable[[memoryview], str]
"""Digests what was copied there; returns the shard's index as JSON."""


class Staging:
    """One save, from the start of its copy to where it is handed over. Two threads.

    Args:
        slot: where to.
        step: steps that the state has.
        copy: reads the state.
        seal: reads it no more.
        hand_over: gets the index, once.
    """

    def __init__(
        self, slot: Slot, step: int, copy: Copy, seal: Seal, hand_over: Callable[[str], None]
    ) -> None:
        self.slot, self._step = slot, step
        self._copy, self._seal, self._hand_over = copy, seal, hand_over
        self._copied = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._waited, self._index = False, ""
        self._thread = threading.Thread(target=self._run, name="holdfast-stage")

    def start(self) -> None:
        """Copy and seal in a thread."""
        self._thread.start()

    def wait(self) -> None:
        """Return once the state may be written to.

        Raises:
            BaseException: what the copy raised.
        """
        self._copied.wait()
        if self._error is not None:
            raise self._error
        with self._lock:
            first, self._waited = not self._waited, True
            index = self._index
        if first and index:
            self._hand_over(index)

    def require_waited(self, step: int) -> None:
        """Refuse that a step is over which has moved what nobody has waited for.

        Raises:
            MisconfiguredError: if so.
        """
        if step > self._step and not self._waited:
            raise MisconfiguredError(
                f"step {step} is over, and has moved the state of step {self._step} while that was "
                "copied, so that the copy is of no use",
                hint="call Worker.await_copied right before each update, or stage without overlap",
            )

    def join(self) -> None:
        """Wait until the slot is written to no more."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._copy(self.slot.buffer)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error
            return
        finally:
            self._copied.set()
        index = self._seal(self.slot.buffer)
        with self._lock:
            self._index = index
            waited = self._waited
        if waited:
            self._hand_over(index)
