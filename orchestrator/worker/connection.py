"""The socket and the beacon between a rank and its agent, and the seat that the rank has."""

from __future__ import annotations

import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from orchestrator.protocol.ids import Generation
from orchestrator.protocol.rank import Died, FromRank, Misbehave, Reached, Seat, Troubled, frame
from orchestrator.worker.beacon import BeaconWriter
from orchestrator.worker.errors import Aborted, MisconfiguredError, UnrestorableError
from orchestrator.worker.misbehaviour import DETAILED, misbehave
from orchestrator.worker.orders import Orders
from orchestrator.worker.slot import Slots


class Connection:
    """One rank's. Methods are for the main thread, unless said.

    Args:
        control: to its agent.
        beacon: in shared memory, where the agent reads how far the rank is.
        memory: the agent's folder in shared memory.
    """

    def __init__(self, control: socket.socket, beacon: BeaconWriter, memory: Path) -> None:
        self._control = control
        self._beacon = beacon
        self._send_lock = threading.Lock()
        self._slots = Slots(memory)
        self._orders = Orders(self._slots)
        self._on_fault: Callable[[Misbehave], None] = _unable

    @property
    def seat(self) -> Seat | None:
        """The seat that was taken and not left yet."""
        return self._orders.seat

    def reached(self, mark: str, generation: Generation | None = None) -> None:
        """Announce a mark on the way into this generation (protocol.rank.Reached)."""
        self._send(Reached(generation=generation or self._generation, mark=mark))

    @property
    def aborted(self) -> bool:
        """Whether this rank was told to leave the generation that it is in. Any thread."""
        return self._orders.aborted

    def check(self) -> None:
        """Raise Aborted if this generation is over; carry out a planned fault."""
        if self.aborted:
            raise Aborted(f"generation {self._generation} is over")
        while self._orders.misbehave:
            order = self._orders.misbehave.popleft()
            if order.options and order.how not in DETAILED:
                self._on_fault(order)
            else:
                misbehave(order)

    def on_fault(self, callback: Callable[[Misbehave], None]) -> None:
        """Have `callback` called, on the main thread, with planned faults that only it can commit.

        Those are within what it computes, such as a bit that flips. Without a callback, one of
        them ends the run as misconfigured.
        """
        self._on_fault = callback

    def troubled(self, error: BaseException) -> None:
        """Report that a collective failed under this rank, which stays and waits for a seat."""
        self._send(Troubled(generation=self._generation, message=str(error)[:2000]))

    def died(self, error: BaseException) -> None:
        """Report the exception that ends this rank, before it ends."""
        text = "".join(traceback.format_exception(error))
        hint = getattr(error, "hint", "")
        self._send(
            Died(
                generation=self.seat.generation if self.seat else Generation(0),
                kind=type(error).__qualname__,
                message=f"{error}" + (f"\nhint: {hint}" if hint else ""),
                traceback=text[-32_000:],
                misconfigured=isinstance(error, MisconfiguredError),
                unrestorable=isinstance(error, UnrestorableError),
            )
        )

    @property
    def _generation(self) -> Generation:
        assert self.seat is not None, "no seat taken"
        return self.seat.generation

    def _send(self, message: FromRank) -> None:
        with self._send_lock:
            self._control.sendall(frame(message))


def _unable(order: Misbehave) -> None:
    raise MisconfiguredError(
        f"the fault plan asks for {order.how}, and this program has no way to commit it",
        hint="give Worker.on_fault what commits it, or take the fault out of the plan",
    )
