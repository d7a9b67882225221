"""A save whose copy is made beside what the program computes next, for programs that ask for it.

Nothing but an update writes to the state, so it can be copied beside forward and backward, if the
next update waits for that. Whether it did wait is all that tells a sound copy from one of two
steps: so a copy is handed over only when it is made *and* somebody has waited for it. One that is
late is given up: the update goes on, and whatever comes of the copy is handed over to nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from orchestrator.worker.errors import MisconfiguredError, SaveStuckError
from orchestrator.worker.slot import Slot

Copy = Callable[[memoryview], object]
"""Copies the state into a slot's memory."""
Seal = Callable[[memoryview], str]
"""Digests what was copied there; returns the shard's index as JSON."""
_POLL_S = 0.02


class Staging:
    """One save, from the start of its copy to where it is handed over. Two threads.

    Args:
        slot: where to.
        step: steps that the state has.
        copy: reads the state.
        seal: reads it no more.
        hand_over: gets the index, once.
        give_back: called once nobody writes to the slot any more, if the copy was given up.
        within_s: a copy that is not made so long after the start is given up.

    Attributes:
        given_up: whether it was; nothing is handed over then.
    """

    def __init__(
        self,
        slot: Slot,
        step: int,
        copy: Copy,
        seal: Seal,
        hand_over: Callable[[str], None],
        give_back: Callable[[], None],
        *,
        within_s: float = 60.0,
    ) -> None:
        self.slot, self.step, self.given_up = slot, step, False
        self._copy, self._seal = copy, seal
        self._hand_over, self._give_back = hand_over, give_back
        self._within_s, self._begun = within_s, time.monotonic()
        self._copied = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._waited, self._index = False, ""
        # A daemon: a copy that is stuck keeps no process from ending.
        self._thread = threading.Thread(target=self._run, name="holdfast-stage", daemon=True)

    def start(self) -> None:
        """Copy and seal in a thread."""
        self._thread.start()

    def wait(self, alive: Callable[[], object] = lambda: None) -> bool:
        """Return once the state may be written to, and whether there is a copy of it as it was.

        There is none if that was not made in time.

        Args:
            alive: called now and then; what it raises, this raises.

        Raises:
            BaseException: what the copy raised.
        """
        if self.given_up:
            return False
        while not self._copied.wait(_POLL_S):
            alive()
            if time.monotonic() > self._begun + self._within_s:
                break
        with self._lock:
            # What is made from here on may be of the state that follows.
            self.given_up = not self._copied.is_set()
            first, self._waited = not self._waited, True
            index = self._index
        if self.given_up:
            return False
        if self._error is not None:
            raise self._error
        if first and index:
            self._hand_over(index)
        return True

    def require_waited(self, step: int) -> None:
        """Refuse that a step is over which has moved what nobody has waited for.

        Raises:
            MisconfiguredError: if so.
        """
        if step > self.step and not self._waited:
            raise MisconfiguredError(
                f"step {step} is over, and has moved the state of step {self.step} while that was "
                "copied, so that the copy is of no use",
                hint="call Worker.await_copied right before each update, or stage without overlap",
            )

    def ends(self, within_s: float) -> bool:
        """Return whether the slot is written to no more, after so many seconds at the latest."""
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait until the slot is written to no more.

        Raises:
            SaveStuckError: if it still is after as long as a copy may take.
        """
        if not self.ends(self._within_s):
            raise SaveStuckError(
                f"the thread that saves step {self.step} is not done "
                f"{time.monotonic() - self._begun:.1f} s after it was begun, expected "
                f"{self._within_s:g} s"
            )

    def _run(self) -> None:
        try:
            self._copy(self.slot.buffer)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error
        with self._lock:
            self._copied.set()
        if self.given_up:
            self._give_back()
        if self.given_up or self._error is not None:
            return
        index = self._seal(self.slot.buffer)
        with self._lock:
            self._index = index
            waited = self._waited
        if waited:
            self._hand_over(index)
