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

import collections
import contextlib
import faulthandler
import mmap
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import (
    BEACON_VARIABLE,
    CONTROL_FD_VARIABLE,
    MEMORY_VARIABLE,
    Abort,
    Died,
    Finished,
    Framer,
    FromRank,
    JobAhead,
    Misbehave,
    Offer,
    Persisted,
    Reached,
    Rendezvous,
    Restore,
    Retire,
    Seat,
    SlotFreed,
    Staged,
    ToRank,
    Troubled,
    frame,
    read_to_rank,
)
from orchestrator.worker.beacon import BeaconWriter, StepRecord
from orchestrator.worker.errors import (
    EXIT_ORPHANED,
    EXIT_STUCK,
    Aborted,
    MisconfiguredError,
    NotSupervisedError,
)
from orchestrator.worker.misbehaviour import misbehave
from orchestrator.worker.output import redirect
from orchestrator.worker.slot import Slot

Prepare = Callable[[JobAhead, Callable[[], None]], None]
"""Gets what every seat of a job needs ready on this node, such as data.

Calls its second argument while it waits for anything; that raises `Aborted` when a seat is there.
"""
LEAVE_SHARE = 0.8
"""Of a seat's `abort_within_s`: a process that has not left by then ends itself, well before it
would be killed, and with a traceback that says what held it."""


class Worker:
    """One rank's connection to its agent. Methods are for the main thread, unless said."""

    def __init__(self, control: socket.socket, beacon: BeaconWriter, memory: Path) -> None:
        self._control = control
        self._beacon = beacon
        self._memory = memory
        self._send_lock = threading.Lock()
        self._changed = threading.Condition()
        self._seats: collections.deque[Seat] = collections.deque()
        self._ahead: JobAhead | None = None
        self._retired = False
        self._abort_before = Generation(0)
        self._on_abort: Callable[[], None] | None = None
        self._rendezvous: Rendezvous | None = None
        self._persisted: set[Step] = set()
        self._misbehave = ""
        self._free_slots: list[int] = []
        self._freed: list[int] = []
        """Slots freed since the newest seat came."""
        self._slots: dict[Path, Slot] = {}
        self._stepped = False
        self._leaving: tuple[Generation, float] | None = None
        self.seat: Seat | None = None
        self._framer = Framer()
        self._incoming = select.poll()  # select() knows no descriptor above 1023
        self._incoming.register(control, select.POLLIN)
        # What lies there already is obeyed first, so that `expected` is not a matter of luck.
        while self._incoming.poll(0):
            self._hear()
        threading.Thread(target=self._listen, name="holdfast-control", daemon=True).start()

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

    # Taking a seat ------------------------------------------------------------------------

    def next_seat(self, prepare: Prepare | None = None) -> Seat | None:
        """Wait for the next seat; None when there is none to come and the process should end.

        The wait ends with the agent at the latest: a rank whose agent is gone is ended.

        Args:
            prepare: called while there is no seat, once it is known what one would be of.
        """
        self._on_abort = None
        previous, self.seat = self.seat, None
        self._beacon.update(phase=RankPhase.WAITING)
        if previous is not None:
            self.reached("left", previous.generation)
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
        )
        return seat

    @property
    def expected(self) -> bool:
        """Whether `next_seat` would return at once: a seat is there, or none will ever be."""
        return self._retired or bool(self._seats)

    def _get_ready(self, prepare: Prepare) -> None:
        """Wait until a seat is to be taken; prepare for what it will be of meanwhile."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.expected or self._ahead is not None)
                ahead, self._ahead = self._ahead, None
            if self.expected or ahead is None:
                return
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
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.expected)
                if not self._seats:
                    return None
                seat = self._seats[-1]
                self._seats.clear()
                over = seat.generation < self._abort_before
                if not over:
                    self._free_slots = sorted({*seat.free_slots, *self._freed})
                    self._persisted.clear()
                    # Under the lock: an abort finds the seat either not taken or here.
                    self.seat = seat
            if not over:
                redirect(seat.log)
                return seat
            self.reached("left", seat.generation)

    def offer(self, address: str) -> None:
        """Rank 0: say where this generation's store listens (host:port)."""
        self._send(Offer(generation=self._generation, address=address))

    def rendezvous(self, timeout_s: float) -> str:
        """Wait for the address of this generation's store.

        Raises:
            Aborted: if the generation ended meanwhile.
            TimeoutError: after `timeout_s`.
        """
        generation = self._generation

        def known() -> bool:
            here = self._rendezvous
            return self.aborted or (here is not None and here.generation == generation)

        with self._changed:
            if not self._changed.wait_for(known, timeout_s):
                raise TimeoutError(f"no rendezvous for generation {generation} in {timeout_s} s")
        self.check()
        assert self._rendezvous is not None
        return self._rendezvous.address

    def reached(self, mark: str, generation: Generation | None = None) -> None:
        """Announce a mark on the way into this generation (protocol.rank.Reached)."""
        self._send(Reached(generation=generation or self._generation, mark=mark))

    # Leaving ------------------------------------------------------------------------------

    @property
    def aborted(self) -> bool:
        """Whether this rank was told to leave the generation that it is in. Any thread."""
        return self.seat is not None and self.seat.generation < self._abort_before

    def on_abort(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, on the control thread, the moment an abort arrives.

        It must not block: its job is to make the main thread's collective fail. What it raises
        there is printed.
        """
        self._on_abort = callback
        if self.aborted:
            callback()

    def check(self) -> None:
        """Raise Aborted if this generation is over; carry out a planned fault."""
        if self.aborted:
            raise Aborted(f"generation {self._generation} is over")
        if self._misbehave:
            how, self._misbehave = self._misbehave, ""
            misbehave(how)

    # Reporting ----------------------------------------------------------------------------

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        """Announce what this rank does from now on. Raises Aborted if its generation is over."""
        self._beacon.update(phase=phase, micro_batch=micro_batch)
        if phase is RankPhase.FINISHING:
            self._announce_stepped()  # restored behind the last step: there is none to take
        self.check()

    def entered_collective(self) -> None:
        """Count one collective entered; names the rank that never joined when others hang."""
        self._beacon.update(collectives=self._beacon.now.collectives + 1)

    def step_done(
        self, step: int, *, loss: float, grad_norm: float, tokens: int, seconds: float
    ) -> None:
        """Report optimizer step `step` (1-based) complete, with the loss of the global batch."""
        self._beacon.update(step=Step(step), micro_batch=0)
        self._beacon.record(
            StepRecord(self._generation, Step(step), loss, grad_norm, tokens, seconds)
        )
        self._announce_stepped()
        self.check()

    def _announce_stepped(self) -> None:
        if not self._stepped:
            self._stepped = True
            self.reached("stepped")

    # State --------------------------------------------------------------------------------

    def restore_view(self, restore: Restore) -> memoryview:
        """Map the body of the shard to continue from, read-only."""
        with Path(restore.path).open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def slot(self, size: int) -> Slot | None:
        """Return a staging slot of `size` bytes, or None if none is free or there is no room.

        Without a slot a save is skipped, never awaited. Best skip it on all ranks: a step is of
        use only if every rank has it, and `give_back` is for those that had a slot.
        """
        with self._changed:
            if not self._free_slots:
                return None
            number = self._free_slots.pop(0)
        assert self.seat is not None
        # By file, not by number: a process that is seated at another rank has other slots.
        path = self._memory / f"rank-{self.seat.rank:05d}.slot-{number}"
        known = self._slots.get(path)
        if known is None or len(known.buffer) != size or not known.is_there:
            try:
                known = self._slots[path] = Slot(number, path, size)
            except OSError as error:  # no room: a failed save does not end training either
                print(f"no slot of {size} bytes: {error}", file=sys.stderr)  # noqa: T201 - the log
                with self._changed:
                    self._free_slots.append(number)
                return None
        return known

    def give_back(self, slot: Slot) -> None:
        """Return a slot unused."""
        with self._changed:
            self._free_slots.append(slot.number)

    def staged(self, slot: Slot, *, generation: int, step: int, index: str, durable: bool) -> None:
        """Hand a filled and digested slot over to the agent. Any thread."""
        self._send(
            Staged(
                generation=Generation(generation),
                step=Step(step),
                slot=slot.number,
                index=index,
                durable=durable,
            )
        )

    def stalled(self, seconds: float) -> None:
        """Add to the time for which saving kept training waiting."""
        self._beacon.update(stall_s=self._beacon.now.stall_s + seconds)

    def await_persisted(self, step: int, timeout_s: float) -> bool:
        """Wait until this rank's shard of `step` is durable; False after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self.aborted and (left := deadline - time.monotonic()) > 0:
            with self._changed:
                if self._changed.wait_for(lambda: step in self._persisted or self.aborted, left):
                    break
        self.check()
        return step in self._persisted

    def finished(self, step: int, lanes: tuple[int, int]) -> None:
        """Report that all steps are done, with this rank's part of the state digest."""
        self._beacon.update(phase=RankPhase.DONE)
        self._send(Finished(generation=self._generation, step=Step(step), lanes=lanes))

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
            )
        )

    # The control thread -------------------------------------------------------------------

    @property
    def _generation(self) -> Generation:
        assert self.seat is not None, "no seat taken"
        return self.seat.generation

    def _send(self, message: FromRank) -> None:
        with self._send_lock:
            self._control.sendall(frame(message))

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
                self.died(error)
            os._exit(1)

    def _hear(self) -> None:
        try:
            data = self._control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            os._exit(0 if self._retired else EXIT_ORPHANED)
        for body in self._framer.feed(data):
            self._obey(read_to_rank(body))

    def _patience_ms(self) -> float | None:
        """Return how long the main thread still has to leave; None if it need not."""
        if self._leaving is None:
            return None
        return max(self._leaving[1] - time.monotonic(), 0.0) * 1000

    def _end_if_stuck(self) -> None:
        assert self._leaving is not None
        generation, _ = self._leaving
        self._leaving = None
        seat = self.seat
        if self.aborted and seat is not None and seat.generation == generation:
            # Whatever holds the main thread, waiting longer helps nobody: a parked process is
            # there to take the seat. Without destructors, which wait for peers that have left.
            os.write(2, f"told to leave generation {generation} and still in it\n".encode())
            faulthandler.dump_traceback(2, all_threads=True)
            os._exit(EXIT_STUCK)

    def _obey(self, message: ToRank) -> None:  # noqa: C901 - one case per message
        with self._changed:
            match message:
                case Seat():
                    self._seats.append(message)
                    self._freed = []
                    self._abort_before = max(self._abort_before, message.generation)
                case Abort(before=before):
                    self._abort_before = max(self._abort_before, before)
                case JobAhead():
                    self._ahead = message
                case Rendezvous():
                    self._rendezvous = message
                case SlotFreed(slot=slot):
                    # The seat that waits to be taken does not name it yet.
                    self._freed.append(slot)
                    if slot not in self._free_slots:
                        self._free_slots.append(slot)
                case Persisted(step=step):
                    self._persisted.add(step)
                case Misbehave(how=how):
                    self._misbehave = how
                case Retire():
                    self._retired = True
                    self._abort_before = Generation(1 << 62)
            self._changed.notify_all()
        if self.aborted:
            self._begin_to_leave()

    def _begin_to_leave(self) -> None:
        seat = self.seat
        if seat is None:
            return
        if self._leaving is None or self._leaving[0] != seat.generation:
            leave_within_s = LEAVE_SHARE * seat.abort_within_s
            self._leaving = (seat.generation, time.monotonic() + leave_within_s)
        callback = self._on_abort
        if callback is None:
            return
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - the orders that follow must be heard
            # If nothing else brings the main thread back, it is stuck, and ended as such.
            traceback.print_exception(error)
