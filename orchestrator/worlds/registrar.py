"""Keeps the device ledger for one run: adds what its controller orders, tells what others add.

A store may hang, for minutes or for good. No method here waits for it but `at_start`, which is
bounded. What could not be added is tried again, in the order in which it was ordered, until it is,
or the run is over; then it is ordered again by the next life.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from orchestrator.core.decisions import JudgeDevice
from orchestrator.core.events import DeviceJudged, DeviceKnown, DevicesKnown, Event
from orchestrator.core.standing import Standing
from orchestrator.protocol.ids import Seconds
from orchestrator.worlds.devices import DeviceLedger
from orchestrator.worlds.lane import Lane
from storage.errors import StorageError

log = logging.getLogger(__name__)
Tell = Callable[[Event], None]
LOOK_EVERY_S = 10.0
"""What operators and other runs add is known after this."""
AGAIN_S = 5.0
"""What could not be added is tried again after this, and then after twice as long each time."""
AGAIN_MAX_S = 300.0
"""But not later than this."""


class Registrar:
    """The ledger as one run sees it. Any thread.

    Args:
        ledger: read and added to by nobody else in this process.
        run: name of the run.
        clock: the run's clock, for stamping what is told.
        within_s: for how long the store may take to answer.
        wall: seconds since 1970, for what outlives the run.
    """

    def __init__(
        self,
        ledger: DeviceLedger,
        run: str,
        clock: Callable[[], Seconds],
        *,
        within_s: float,
        wall: Callable[[], float] = time.time,  # noqa: TID251 - verdicts of many runs and hosts
    ) -> None:
        self._ledger, self._run, self._clock, self._wall = ledger, run, clock, wall
        self._within_s = within_s
        self._lane = Lane("holdfast-devices", within_s)
        self._over = threading.Event()
        # What hangs is left to its thread, so two may be at it at a time.
        self._lock = threading.Lock()
        self._pending: dict[str, tuple[JudgeDevice, Tell]] = {}
        """In the order in which they are to be on record."""
        self._retrying = False
        self._again_s = AGAIN_S
        self._unread = ""
        """Why the last look failed."""
        self._unrecorded = ""
        """Why the first of what is pending could not be added, when that was tried first."""
        self._told: tuple[int, str] = (-1, "")
        """How much there was when it was told last, and what was wrong."""

    def at_start(self) -> Event:
        """Return what the ledger says now, waiting for it no longer than it may take."""
        answered: list[Event] = []
        given_up = threading.Event()
        self._lane.submit(partial(self._look, answered.append, given_up), lambda: None)
        self._lane.latest().wait(self._within_s)
        with self._lock:
            if answered:
                return answered[0]
            # Nobody hears what comes later than that: it is told with the next look.
            given_up.set()
            return self._silent()

    def watch(self, tell: Tell) -> None:
        """Tell from now on whenever somebody else adds a verdict."""

        def look_again_and_again() -> None:
            while not self._over.wait(LOOK_EVERY_S):
                self._lane.submit(partial(self._look, tell), partial(self._late, tell))
                self._lane.latest().wait(self._within_s)

        threading.Thread(target=look_again_and_again, name="holdfast-ledger", daemon=True).start()

    def judge(self, order: JudgeDevice, tell: Tell) -> None:
        """Put a verdict on record; answered by DeviceJudged, once it is there."""
        with self._lock:
            self._pending[order.id] = order, tell
        self._lane.submit(partial(self._record, tell), partial(self._not_recorded, tell))

    def settle(self, within_s: float) -> bool:
        """Wait until what was ordered is on record; return whether it is. Nothing follows."""
        self._over.set()
        with self._lock:
            tells = [tell for _, tell in self._pending.values()]
        if tells:
            self._lane.submit(partial(self._record, tells[-1]), lambda: None)
        self._lane.latest().wait(within_s)
        return not self._pending

    def _record(self, tell: Tell) -> None:
        """Put all that is pending on record, in order: a later verdict supposes an earlier one."""
        while True:
            with self._lock:
                order, its_tell = next(iter(self._pending.values()), (None, tell))
            if order is None:
                break
            try:
                self._ledger.add(order.verdict(at=self._wall(), run=self._run))
            except StorageError as error:
                # Told once: a store may word it otherwise each time.
                if not self._unrecorded:
                    self._unrecorded = f"a verdict about a device is not on record yet: {error}"
                    log.warning("%s", self._unrecorded)
                self._say(tell)
                self._try_again(tell)
                return
            with self._lock:
                if self._pending.pop(order.id, None) is None:
                    continue  # another thread, which was left, has told it
                self._again_s = AGAIN_S
                record = self._ledger.records()[order.device.serial]
                device = DeviceKnown(record.serial, record.standing, record.why)
                its_tell(DeviceJudged(at=self._clock(), id=order.id, device=device))
        if self._unrecorded:
            self._unrecorded = ""
            self._say(tell)

    def _not_recorded(self, tell: Tell) -> None:
        """Go on from a store that did not answer in time, or kept others from their turn."""
        self._late(tell)
        self._try_again(tell)

    def _try_again(self, tell: Tell) -> None:
        with self._lock:
            if self._retrying or not self._pending:
                return
            self._retrying = True
            pause_s, self._again_s = self._again_s, min(2 * self._again_s, AGAIN_MAX_S)

        def wait_and_record() -> None:
            over = self._over.wait(pause_s)
            with self._lock:
                self._retrying = False
            if not over:
                self._lane.submit(partial(self._record, tell), partial(self._not_recorded, tell))

        threading.Thread(target=wait_and_record, name="holdfast-ledger", daemon=True).start()

    def _look(self, tell: Tell, given_up: threading.Event | None = None) -> None:
        """Tell what the ledger says, if that is news, or if somebody waits for it."""
        try:
            self._ledger.refresh()
        except StorageError as error:
            self._unread = f"the device ledger does not answer: {error}"
        else:
            self._unread = ""
        self._say(tell, given_up)

    def _say(self, tell: Tell, given_up: threading.Event | None = None) -> None:
        # By whoever finds it, the words are the same while nothing changes: equal ones are not
        # told again, and a journal does not grow by them.
        problem = self._unread or self._unrecorded or self._ledger.problem()
        with self._lock:
            now = (len(self._ledger.verdicts) + len(self._ledger.damages), problem)
            if now == self._told if given_up is None else given_up.is_set():
                return
            self._told = now
            tell(self._known(problem))

    def _known(self, problem: str) -> DevicesKnown:
        records = (record for _, record in sorted(self._ledger.records().items()))
        held = (r for r in records if r.standing is not Standing.HEALTHY)
        return DevicesKnown(
            at=self._clock(),
            devices=tuple(DeviceKnown(r.serial, r.standing, r.why) for r in held),
            problem=problem,
        )

    def _silent(self) -> DevicesKnown:
        problem = f"the device ledger did not answer within {self._within_s:g} s"
        self._told = (0, problem)
        return DevicesKnown(at=self._clock(), problem=problem)

    def _late(self, tell: Tell) -> None:
        with self._lock:
            if not self._told[1]:
                tell(self._silent())
