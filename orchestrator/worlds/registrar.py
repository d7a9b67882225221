"""Keeps the device ledger for one run: adds what its controller orders, tells what others add.

A store may hang, for minutes or for good. No method here waits for it but `at_start`, which is
bounded. What could not be added is tried again until it is, or the run is over; then it is ordered
again by the next life.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from orchestrator.core.decisions import JudgeDevice
from orchestrator.core.events import DeviceJudged, DeviceKnown, DevicesKnown, Event
from orchestrator.core.standing import DeviceVerdict, Standing
from orchestrator.protocol.ids import Seconds
from orchestrator.worlds.devices import DeviceLedger
from orchestrator.worlds.lane import Lane
from storage.errors import StorageError

log = logging.getLogger(__name__)
Tell = Callable[[Event], None]
LOOK_EVERY_S = 10.0
"""What operators and other runs add is known after this."""
AGAIN_S = 5.0
"""What could not be added is tried again after this."""


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
        self._pending: dict[str, JudgeDevice] = {}
        self._told: tuple[int, str] = (-1, "")
        """How much there was when it was told last, and what was wrong."""

    def at_start(self) -> Event:
        """Return what the ledger says now, waiting for it no longer than it may take."""
        answered: list[Event] = []
        self._lane.submit(partial(self._look, answered.append), lambda: None)
        self._lane.latest().wait(self._within_s)
        # What comes later than that is told with the next look.
        return answered[0] if answered else self._silent()

    def watch(self, tell: Tell) -> None:
        """Tell from now on whenever somebody else adds a verdict."""

        def look_again_and_again() -> None:
            while not self._over.wait(LOOK_EVERY_S):
                self._lane.submit(partial(self._look, tell), partial(self._late, tell))
                self._lane.latest().wait(self._within_s)

        threading.Thread(target=look_again_and_again, name="holdfast-ledger", daemon=True).start()

    def judge(self, order: JudgeDevice, tell: Tell) -> None:
        """Put a verdict on record; answered by DeviceJudged, once it is there."""
        self._pending[order.id] = order
        self._lane.submit(partial(self._add, order, tell), partial(self._late, tell))

    def settle(self, within_s: float) -> bool:
        """Wait until what was ordered is on record; return whether it is. Nothing follows."""
        self._over.set()
        self._lane.latest().wait(within_s)
        return not self._pending

    def _add(self, order: JudgeDevice, tell: Tell) -> None:
        verdict = DeviceVerdict(
            serial=order.device.serial,
            act=order.act,
            actor=order.actor,
            by=order.by,
            reason=order.reason,
            proof=order.proof,
            kind=order.device.kind,
            model=order.device.model,
            run=self._run,
            incident=order.incident or "",
            node=order.node,
            at=self._wall(),
            id=order.id,
        )
        try:
            self._ledger.add(verdict)
        except StorageError as error:
            problem = f"a verdict about a device is not on record yet: {error}"
            log.warning("%s", problem)
            self._say(problem, tell)
            self._try_again(order, tell)
            return
        self._pending.pop(order.id, None)
        record = self._ledger.records()[verdict.serial]
        device = DeviceKnown(record.serial, record.standing, record.why)
        tell(DeviceJudged(at=self._clock(), id=order.id, device=device))

    def _try_again(self, order: JudgeDevice, tell: Tell) -> None:
        def wait_and_judge() -> None:
            if not self._over.wait(AGAIN_S):
                self.judge(order, tell)

        threading.Thread(target=wait_and_judge, name="holdfast-ledger", daemon=True).start()

    def _look(self, tell: Tell) -> None:
        """Tell what the ledger says, if that is news."""
        problem = ""
        try:
            self._ledger.refresh()
        except StorageError as error:
            problem = f"the device ledger does not answer: {error}"
        self._say(problem or self._ledger.problem(), tell)

    def _say(self, problem: str, tell: Tell) -> None:
        now = (len(self._ledger.verdicts) + len(self._ledger.damages), problem)
        if now == self._told:
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
        if not self._told[1]:
            tell(self._silent())
