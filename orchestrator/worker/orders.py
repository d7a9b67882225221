"""What the agent has said so far: written down by the control thread, acted on by the main one."""

from __future__ import annotations

import collections
import threading

from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.rank import (
    Abort,
    JobAhead,
    Misbehave,
    Parked,
    Persisted,
    Probe,
    Rendezvous,
    Retire,
    SaveEvery,
    Seat,
    SlotFreed,
    ToRank,
)
from orchestrator.worker.slot import Slots

_NEVER_AGAIN = Generation(1 << 62)


class Orders:
    """Of one process.

    Attributes:
        seat: the seat that was taken and not left yet.
        retired: whether the agent has no further seat.
        save_every: what was said last of how often to save, of whatever generation.
        misbehave: the planned faults to commit at the next check.
        probe: what to measure at the end of the step; None for nothing.
    """

    def __init__(self, slots: Slots) -> None:
        self.seat: Seat | None = None
        self.retired = False
        self.save_every: SaveEvery | None = None
        self.misbehave: collections.deque[Misbehave] = collections.deque()
        self.probe: Probe | None = None
        self._slots = slots
        self._changed = threading.Condition()
        self._seats: collections.deque[Seat] = collections.deque()
        self._ahead: JobAhead | None = None
        self._abort_before = Generation(0)
        self._rendezvous: Rendezvous | None = None
        self._persisted: set[Step] = set()
        self._persisting: set[Step] = set()
        """Staged to be durable, and neither that nor given up."""
        self._given_up: set[Step] = set()

    def take(self, message: ToRank) -> None:  # noqa: C901 - one case per message
        """Write down what the agent says."""
        with self._changed:
            match message:
                case Seat():
                    self._seats.append(message)
                    self._slots.expect()
                    self._abort_before = max(self._abort_before, message.generation)
                case Abort(before=before):
                    self._abort_before = max(self._abort_before, before)
                case Parked():
                    self._slots.let_go()
                case JobAhead():
                    self._ahead = message
                case Rendezvous():
                    self._rendezvous = message
                case SlotFreed(slot=slot):
                    self._slots.freed(slot)
                case Persisted(step=step, given_up=given_up):
                    self._persisting.discard(step)
                    (self._given_up if given_up else self._persisted).add(step)
                case SaveEvery():
                    self.save_every = message
                case Misbehave():
                    self.misbehave.append(message)
                case Probe():
                    self.probe = message
                case Retire():
                    self.retired = True
                    self._abort_before = _NEVER_AGAIN
            self._changed.notify_all()

    @property
    def expected(self) -> bool:
        """Whether a seat is there, or none will ever be."""
        return self.retired or bool(self._seats)

    @property
    def aborted(self) -> bool:
        """Whether the seat that was taken is to be left."""
        seat = self.seat  # once: the main thread may leave it meanwhile
        return seat is not None and seat.generation < self._abort_before

    def await_ahead(self) -> JobAhead | None:
        """Wait until it is known what a seat would be of; None if one is to be taken instead."""
        with self._changed:
            self._changed.wait_for(lambda: self.expected or self._ahead is not None)
            ahead, self._ahead = self._ahead, None
        return None if self.expected else ahead

    def next_seat(self) -> Seat | None:
        """Wait for a seat and return the newest; None if none will ever be.

        It is taken, and `seat` from now on, unless it is over already.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.expected)
            if not self._seats:
                return None
            seat = self._seats[-1]
            self._seats.clear()
            if seat.generation >= self._abort_before:
                self._slots.begin(Rank(seat.rank), seat.free_slots)
                self._persisted.clear()
                self._persisting.clear()
                self._given_up.clear()
                # Under the lock: an abort finds the seat either not taken or here.
                self.seat = seat
            return seat

    def await_rendezvous(self, generation: Generation, within_s: float) -> str | None:
        """Wait for the address of a generation's store; None if its seat is to be left first.

        Raises:
            TimeoutError: after `within_s`.
        """

        def known() -> bool:
            here = self._rendezvous
            return self.aborted or (here is not None and here.generation == generation)

        with self._changed:
            if not self._changed.wait_for(known, within_s):
                raise TimeoutError(f"no rendezvous for generation {generation} in {within_s} s")
            return self._rendezvous.address if self._rendezvous and not self.aborted else None

    def staged(self, step: Step) -> None:
        """Note that this rank's shard of `step` is about to be handed over, to be durable."""
        with self._changed:
            self._persisting.add(step)

    @property
    def persisting(self) -> bool:
        """Whether a shard of this rank is on its way to the durable tier."""
        with self._changed:
            return bool(self._persisting)

    def await_persisted(self, step: Step, within_s: float) -> bool:
        """Wait until this rank's shard of `step` is durable; return whether it is."""

        def known() -> bool:
            return self.aborted or step in self._persisted or step in self._given_up

        with self._changed:
            self._changed.wait_for(known, within_s)
            return step in self._persisted
