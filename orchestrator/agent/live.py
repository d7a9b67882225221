"""One process of a node: the rank that it is, was, or stands by to be."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

from orchestrator.agent.control import Control
from orchestrator.agent.process import RankProcess
from orchestrator.protocol.ids import Generation
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import Abort, Died, FromRank, Parked, Reached, Seat
from orchestrator.worker.beacon import BeaconError, BeaconReader, Reading


class LiveRank:
    """One process.

    Attributes:
        seat: the seat it was given last; None while it is parked.
        left: whether it has left that seat, and waits for the next.
        aborted: whether it was told to leave that seat.
        dismissed: whether it was told to end, or killed, by us: its end is no news.
        last_words: what it said of the exception that ends it.
        broken: whether it said so before anybody told it to leave or to end.
        log_from: size of its log when it got its seat.
        out: set when it has left, or ended.
        pace: seconds that it computed, processor seconds of that, and what, in one of its newest
            steps.
        gone: set when it has ended, and what it left behind is reaped.
    """

    def __init__(self, process: RankProcess, page: Path) -> None:
        self.process = process
        self.control: Control
        self.beacon = BeaconReader(page)
        self.seat: Seat | None = None
        self.left = False
        self.aborted = False
        self.dismissed = False
        self.last_words: Died | None = None
        self.broken = False
        self.log_from = 0
        self.out = asyncio.Event()
        self.gone = asyncio.Event()
        self.pace = (0.0, 0.0, 0.0)
        self._counted: Reading | None = None
        self._page = page

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def read(self) -> Reading | None:
        """Return what its beacon says; None if that is no beacon (any more)."""
        try:
            return self.beacon.read()
        except (BeaconError, ValueError):
            return None

    def keep_pace(self, reading: Reading) -> None:
        """Take note of how long it computed, on average, in the steps since it was last asked."""
        before = self._counted
        if before is None or before.generation != reading.generation:
            self.pace, self._counted = (0.0, 0.0, 0.0), reading
        elif (steps := reading.step - before.step) > 0:
            spent_s, done = reading.compute_s - before.compute_s, reading.work - before.work
            busy_s = reading.busy_s - before.busy_s
            self.pace, self._counted = (spent_s / steps, busy_s / steps, done / steps), reading

    def take(self, seat: Seat) -> None:
        """Give it a seat."""
        self.seat, self.left, self.aborted = seat, False, False
        self.out.clear()
        self.log_from = _size(seat.log)
        self.control.send(seat)

    def park(self) -> None:
        """Count it among those without a seat, and tell it so."""
        self.seat, self.left, self.aborted = None, False, False
        self.control.send(Parked())

    def leave(self, before: Generation) -> None:
        """Tell it to leave its seat; `out` says when it has."""
        self.aborted = True
        self.control.send(Abort(before=before))
        reading = self.read()
        if reading is not None and reading.phase is RankPhase.STARTING:
            # It has not even come to its seat yet, so there is no world that it could leave.
            self.left = True
            self.out.set()

    def kill(self) -> None:
        """End it; its end is no news."""
        self.dismissed = True
        self.signal(signal.SIGKILL)

    def ended_as_told(self, code: int) -> bool:
        """Whether its end, with this exit code, is what we told it, hence no news.

        To end is a way to leave. To be killed by others is not, whatever it was told, and an
        exception that was there before may be why everybody is told to leave.
        """
        if self.broken:
            return False
        return self.dismissed or (self.aborted and code >= 0)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its process group, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            self.process.signal(number)

    def hear(self, message: FromRank) -> None:
        """Take note of what concerns only this process."""
        match message:
            case Died():
                self.last_words = message
                self.broken = not (self.aborted or self.dismissed)
            case Reached(mark="left", generation=generation):
                if self.seat is not None and generation == self.seat.generation:
                    self.left = True
                    self.out.set()
            case _:
                pass

    def close(self) -> None:
        """Release what it had of ours, once it has ended."""
        self.control.close()
        self.beacon.close()
        self._page.unlink(missing_ok=True)


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size if path else 0
    except OSError:
        return 0
