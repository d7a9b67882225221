"""One rank's connection to its agent. No torch: any program that can take steps can use it.

    def train(worker: Worker, seat: Seat) -> None: ...   # one generation, from seat to last step

    if __name__ == "__main__":
        sys.exit(serve(train))

`serve` gives `train` one seat after the other. When a peer dies or freezes, the agent sends an
abort: callbacks registered with `on_abort` run at once on the control thread (break the sockets
there), and the next `phase`, `check` or `step_done` raises `Aborted` on the main thread. Let it
fly out of `train`; the process lives on and gets a seat in the next generation. A main thread that
does not come back in time is not waited for: the process ends itself, and a parked one is seated.
"""

from __future__ import annotations

import gc
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

from orchestrator.protocol.ids import Rank, Step
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import (
    BEACON_VARIABLE,
    CONTROL_FD_VARIABLE,
    MEMORY_VARIABLE,
    STAND_BY_VARIABLE,
    Finished,
    JobAhead,
    Offer,
    Seat,
)
from orchestrator.worker.beacon import BeaconWriter
from orchestrator.worker.errors import Aborted, NotSupervisedError
from orchestrator.worker.findings import Findings
from orchestrator.worker.listening import Listener
from orchestrator.worker.output import redirect
from orchestrator.worker.steps import Steps

Prepare = Callable[[JobAhead, Callable[[], None]], None]
"""Gets what every seat of a job needs ready on this node, such as data.

Calls its second argument while it waits for anything; that raises `Aborted` when a seat is there.
"""


class Worker(Steps, Findings):
    """One rank's connection to its agent. Methods are for the main thread, unless said.

    How it is seated and leaves is here; its bases have what it tells of its steps, of its saves,
    and of what was found to be wrong.
    """

    def __init__(self, control: socket.socket, beacon: BeaconWriter, memory: Path) -> None:
        super().__init__(control, beacon, memory)
        self._listener = Listener(control, self._orders, on_failure=self.died)
        # What lies there already is obeyed first, so that `expected` is not a matter of luck.
        self._listener.start()

    @classmethod
    def connect(cls) -> Worker:
        """Return the connection that the agent prepared in this process's environment.

        Raises:
            NotSupervisedError: if there is none.
        """
        missing = [
            name
            for name in (CONTROL_FD_VARIABLE, BEACON_VARIABLE, MEMORY_VARIABLE)
            if name not in os.environ
        ]
        if missing:
            raise NotSupervisedError(f"no {', '.join(missing)} in the environment")
        control = socket.socket(fileno=int(os.environ[CONTROL_FD_VARIABLE]))
        beacon = BeaconWriter(Path(os.environ[BEACON_VARIABLE]))
        return cls(control, beacon, Path(os.environ[MEMORY_VARIABLE]))

    def next_seat(self, prepare: Prepare | None = None) -> Seat | None:
        """Wait for the next seat; None when there is none to come and the process should end.

        The wait ends with the agent at the latest: a rank whose agent is gone is ended.

        Args:
            prepare: called while there is no seat, once it is known what one would be of.
        """
        self._listener.on_abort = None
        if self._staging is not None:
            # The next seat may name its slot as free. What nobody has waited for is of no use.
            self._staging.join()
            self._staging = None
        previous, self._orders.seat = self._orders.seat, None
        self._beacon.update(phase=RankPhase.WAITING)
        if previous is not None:
            self.reached("left", previous.generation)
            # What the generation left in cycles, a model for one, would lie beside the next.
            gc.collect()
        if prepare is not None:
            self._get_ready(prepare)
        seat = self._take_seat()
        if seat is None:
            return None
        self._stepped = False
        self._beacon.update(
            generation=seat.generation,
            rank=Rank(seat.rank),
            phase=RankPhase.RENDEZVOUS,
            step=seat.restore.step if seat.restore else Step(0),
            micro_batch=0,
            collectives=0,
            left=0,
        )
        self.in_groups(())
        return seat

    @property
    def stands_by(self) -> bool:
        """Whether this process was made for no seat, and none has come since."""
        return STAND_BY_VARIABLE in os.environ and not self.expected

    @property
    def expected(self) -> bool:
        """Whether `next_seat` would return at once: a seat is there, or none will ever be."""
        return self._orders.expected

    def _get_ready(self, prepare: Prepare) -> None:
        """Wait until a seat is to be taken; prepare for what it will be of meanwhile."""
        while (ahead := self._orders.await_ahead()) is not None:
            self._beacon.update(phase=RankPhase.STARTING)
            try:
                prepare(ahead, self._check_wanted)
            except Aborted:
                pass
            except Exception as error:  # noqa: BLE001 - nobody needs it yet; a seat meets it again
                traceback.print_exception(error)
            self._beacon.update(phase=RankPhase.WAITING)

    def _check_wanted(self) -> None:
        if self.expected:
            raise Aborted("a seat is there, or none will ever be")

    def _take_seat(self) -> Seat | None:
        while (seat := self._orders.next_seat()) is not None:
            if self.seat is seat:
                redirect(seat.log)
                return seat
            self.reached("left", seat.generation)
        return None

    def offer(self, address: str) -> None:
        """Rank 0: say where this generation's store listens (host:port)."""
        self._send(Offer(generation=self._generation, address=address))

    def rendezvous(self, timeout_s: float) -> str:
        """Wait for the address of this generation's store.

        Raises:
            Aborted: if the generation ended meanwhile.
            TimeoutError: after `timeout_s`.
        """
        address = self._orders.await_rendezvous(self._generation, timeout_s)
        self.check()
        assert address is not None
        return address

    def on_abort(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, on the control thread, the moment an abort arrives.

        It must not block: its job is to make the main thread's collective fail. What it raises
        there is printed.
        """
        self._listener.on_abort = callback
        if self.aborted:
            callback()

    def finished(self, step: int, lanes: tuple[int, int]) -> None:
        """Report that all steps are done, with this rank's part of the state digest.

        A save that is under way is waited for, if it is not stuck: whoever hears of the end has
        heard of its last save.
        """
        self.await_copied()
        if self._staging is not None and self.seat is not None:
            self._staging.ends(self.seat.save_within_s)
        self._beacon.update(phase=RankPhase.DONE)
        self._send(Finished(generation=self._generation, step=Step(step), lanes=lanes))
