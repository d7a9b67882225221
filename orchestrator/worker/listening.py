"""The control thread: hears the agent at any time, and sees to it that who is to leave, leaves."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import socket
import threading
import time
import traceback
from collections.abc import Callable

from orchestrator.protocol.ids import Generation
from orchestrator.protocol.rank import Framer, read_to_rank
from orchestrator.worker.errors import EXIT_ORPHANED, EXIT_STUCK
from orchestrator.worker.orders import Orders

LEAVE_SHARE = 0.8
"""Of a seat's `abort_within_s`: a process that has not left by then ends itself, well before it
would be killed, and with a traceback that says what held it."""


class Listener:
    """One process's.

    Args:
        control: the socket to the agent.
        orders: where what is heard is written down.
        on_failure: told what keeps this thread from hearing any more; the process ends after that.

    Attributes:
        on_abort: called when the seat is to be left.
    """

    def __init__(
        self, control: socket.socket, orders: Orders, on_failure: Callable[[Exception], None]
    ) -> None:
        self.on_abort: Callable[[], None] | None = None
        self._control, self._orders, self._on_failure = control, orders, on_failure
        self._framer = Framer()
        self._leaving: tuple[Generation, float] | None = None
        self._incoming = select.poll()  # select() knows no descriptor above 1023
        self._incoming.register(control, select.POLLIN)

    def start(self) -> None:
        """Hear what lies there already, then begin to listen."""
        while self._incoming.poll(0):
            self._hear()
        threading.Thread(target=self._listen, name="holdfast-control", daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                if self._incoming.poll(self._patience_ms()):
                    self._hear()
                else:
                    self._end_if_stuck()
        except Exception as error:  # noqa: BLE001 - whatever it is, the agent must hear of it
            # Nobody would hear an abort from now on, and such a rank must not train on.
            traceback.print_exception(error)
            with contextlib.suppress(OSError):
                self._on_failure(error)
            os._exit(1)

    def _hear(self) -> None:
        try:
            data = self._control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            os._exit(0 if self._orders.retired else EXIT_ORPHANED)
        for body in self._framer.feed(data):
            self._orders.take(read_to_rank(body))
            if self._orders.aborted:
                self._begin_to_leave()

    # Leaving ------------------------------------------------------------------------------

    def _begin_to_leave(self) -> None:
        seat = self._orders.seat
        if seat is None:
            return
        if self._leaving is None or self._leaving[0] != seat.generation:
            leave_within_s = LEAVE_SHARE * seat.abort_within_s
            self._leaving = (seat.generation, time.monotonic() + leave_within_s)
        callback = self.on_abort
        if callback is None:
            return
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - the orders that follow must be heard
            # If nothing else brings the main thread back, it is stuck, and ended as such.
            traceback.print_exception(error)

    def _patience_ms(self) -> float | None:
        """Return how long the main thread still has to leave; None if it need not."""
        if self._leaving is None:
            return None
        return max(self._leaving[1] - time.monotonic(), 0.0) * 1000

    def _end_if_stuck(self) -> None:
        assert self._leaving is not None
        generation, _ = self._leaving
        self._leaving = None
        seat = self._orders.seat
        if self._orders.aborted and seat is not None and seat.generation == generation:
            # Whatever holds the main thread, waiting longer helps nobody: a parked process is
            # there to take the seat. Without destructors, which wait for peers that have left.
            os.write(2, f"told to leave generation {generation} and still in it\n".encode())
            faulthandler.dump_traceback(2, all_threads=True)
            os._exit(EXIT_STUCK)
