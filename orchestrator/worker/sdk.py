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

import contextlib
import gc
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.digests import KINDS, NONE, Kind, Taken
from orchestrator.protocol.groups import ALL
from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import (
    BEACON_VARIABLE,
    CONTROL_FD_VARIABLE,
    MEMORY_VARIABLE,
    STAND_BY_VARIABLE,
    Abandoned,
    DetectorOff,
    Died,
    Diverged,
    Finished,
    FromRank,
    JobAhead,
    Misbehave,
    Offer,
    Probed,
    Reached,
    Repaired,
    Restore,
    Seat,
    Speed,
    Staged,
    Troubled,
    frame,
)
from orchestrator.worker.beacon import GROUPS_MAX, BeaconWriter, DigestRecord, StepRecord
from orchestrator.worker.errors import Aborted, MisconfiguredError, NotSupervisedError
from orchestrator.worker.listening import Listener
from orchestrator.worker.misbehaviour import DETAILED, misbehave
from orchestrator.worker.orders import Orders
from orchestrator.worker.output import redirect
from orchestrator.worker.probing import measure
from orchestrator.worker.slot import Slot, Slots, restore_reader, restore_view
from orchestrator.worker.staging import Copy, Seal, Staging

Prepare = Callable[[JobAhead, Callable[[], None]], None]
"""Gets what every seat of a job needs ready on this node, such as data.

Calls its second argument while it waits for anything; that raises `Aborted` when a seat is there.
"""


class Worker:
    """One rank's connection to its agent. Methods are for the main thread, unless said.

    Attributes:
        probe: measures how fast this rank's device is within so many seconds, when the agent asks;
            a program that computes elsewhere than on a processor sets one of its own.
    """

    def __init__(self, control: socket.socket, beacon: BeaconWriter, memory: Path) -> None:
        self._control = control
        self._beacon = beacon
        self._send_lock = threading.Lock()
        self._slots = Slots(memory)
        self._orders = Orders(self._slots)
        self._stepped = False
        self._waited_s = 0.0
        self._slots_of: dict[str, int] = {}
        """Where the beacon counts the collectives of each group."""
        self._staging: Staging | None = None
        self.probe: Callable[[float], Speed] = measure
        self._on_fault: Callable[[Misbehave], None] = _unable
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

    # Taking a seat ------------------------------------------------------------------------

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

    @property
    def seat(self) -> Seat | None:
        """The seat that was taken and not left yet."""
        return self._orders.seat

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

    def reached(self, mark: str, generation: Generation | None = None) -> None:
        """Announce a mark on the way into this generation (protocol.rank.Reached)."""
        self._send(Reached(generation=generation or self._generation, mark=mark))

    # Leaving ------------------------------------------------------------------------------

    @property
    def aborted(self) -> bool:
        """Whether this rank was told to leave the generation that it is in. Any thread."""
        return self._orders.aborted

    def on_abort(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, on the control thread, the moment an abort arrives.

        It must not block: its job is to make the main thread's collective fail. What it raises
        there is printed.
        """
        self._listener.on_abort = callback
        if self.aborted:
            callback()

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

    # Reporting ----------------------------------------------------------------------------

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        """Announce what this rank does from now on. Raises Aborted if its generation is over."""
        self._beacon.update(phase=phase, micro_batch=micro_batch)
        if phase is RankPhase.FINISHING:
            self._announce_stepped()  # restored behind the last step: there is none to take
        self.check()

    def in_groups(self, names: Iterable[str]) -> None:
        """Say in which process groups this rank is from now on, until its next seat.

        Their collectives are counted from 0 on, so all members say so at the same place of the
        program. Beyond the first few, or without names, collectives are counted all the same, only
        in less detail.

        Args:
            names: of each group one that every member gives it, and nobody who is in another one:
                such as `tp@4`, with the first rank of those that are in it. The group of all ranks
                needs none. One with `>` in it is a connection, over which one rank sends and the
                other receives: who waits for that has nothing to say in who is at fault.

        Raises:
            ValueError: if a name is longer than a beacon has room for.
        """
        told = list(dict.fromkeys((ALL, *names)))
        self._beacon.groups(told)
        self._slots_of = {name: slot for slot, name in enumerate(told[:GROUPS_MAX])}

    def entered_collective(self, group: str | None = ALL) -> None:
        """Count one collective entered; names the rank that never joined when others hang.

        Args:
            group: whose it is, one of `in_groups`; None if that is not known.
        """
        self._beacon.enter(self._slots_of.get(group) if group is not None else None)

    def left_collective(self, group: str | None = ALL) -> None:
        """Count one collective left: until then, this rank waits in it for who has not entered."""
        self._beacon.leave(self._slots_of.get(group) if group is not None else None)

    @contextlib.contextmanager
    def waiting(self, group: str | None = ALL) -> Iterator[None]:
        """Count the time in this block as waiting for peers, not as computing.

        Put it around each collective: who is slow is told by who lets the others wait, and who
        hangs by who has not entered what the others wait in.

        Args:
            group: whose collective it is, one of `in_groups`; without it, one of all ranks.
        """
        begun = time.monotonic()
        self.entered_collective(group)
        yield
        self.left_collective(group)
        self._waited_s += time.monotonic() - begun

    def step_done(  # noqa: PLR0913 - what there is to tell of a step
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        tokens: int,
        seconds: float,
        compute_s: float | None = None,
        busy_s: float = 0.0,
        work: float = 0.0,
    ) -> None:
        """Report optimizer step `step` (1-based) complete.

        Args:
            step: its number.
            loss: of the global batch.
            grad_norm: of the global batch.
            tokens: of the global batch.
            seconds: that the step took.
            compute_s: seconds of it that this rank computed, without waiting for peers; without it,
                what `waiting` did not count, or 0 for not measured if that counted nothing.
            busy_s: processor seconds that computing took it, on all threads that share in that; 0
                if they are not known, or if something else than a processor computes. Other
                programs on the same cores change `compute_s`, and these hardly.
            work: what this rank computed in it, in any unit that all ranks share, such as
                floating-point operations; 0 if all ranks always compute the same.

        Raises:
            Aborted: if this generation is over.
            MisconfiguredError: if the step has moved a state while that was copied; see `stage`.
        """
        if self._staging is not None:
            self._staging.require_waited(step)
        if compute_s is None:
            compute_s = max(seconds - self._waited_s, 0.0) if self._waited_s else 0.0
        self._waited_s = 0.0
        now = self._beacon.now
        self._beacon.update(
            step=Step(step),
            micro_batch=0,
            compute_s=now.compute_s + compute_s,
            busy_s=now.busy_s + busy_s,
            work=now.work + work,
        )
        self._beacon.record(
            StepRecord(self._generation, Step(step), loss, grad_norm, tokens, seconds)
        )
        self._announce_stepped()
        self.check()
        self._probe()

    def _probe(self) -> None:
        """Measure how fast this rank is, if the agent asked for that."""
        order, self._orders.probe = self._orders.probe, None
        if order is None or order.generation != self._generation:
            return
        phase = self._beacon.now.phase
        self._beacon.update(phase=RankPhase.EVALUATING)
        # All come here after the same step, or the one that comes later finds the others waiting.
        time.sleep(order.begins_s)
        try:
            speed = self.probe(order.within_s)
        except Exception as error:  # noqa: BLE001 - a device that can not be measured is an answer
            speed = Speed(0.0, 0.0, f"{type(error).__name__}: {error}"[:500])
        self._beacon.update(phase=phase)
        self._send(Probed(generation=order.generation, number=order.number, speed=speed))

    def digested(self, taken: Taken, digests: Mapping[Kind, int]) -> None:
        """Report digests, each in [0, 2**64); call it before `step_done` of the same step.

        Whatever is in `protocol.digests.SHARED` is compared with that of the ranks which hold the
        same shard; when it differs, the run goes back behind that, without whoever was outvoted.
        """
        values = tuple(digests.get(kind, NONE) for kind in KINDS)
        self._beacon.digest(DigestRecord(self._generation, taken, values))

    def diverged(
        self, step: int, *, since: int, ranks: Sequence[int], proven: bool, evidence: str
    ) -> None:
        """Report that ranks found together who of them computes wrongly; one or two should tell.

        Args:
            step: the last one that was complete.
            since: the last step whose state is known to be good.
            ranks: who does, or may do.
            proven: whether it was these for certain.
            evidence: how it showed, in words.
        """
        self._send(
            Diverged(
                generation=self._generation,
                step=Step(step),
                since=Step(since),
                ranks=tuple(map(Rank, ranks)),
                proven=proven,
                evidence=evidence,
            )
        )

    def looked_again(self, step: int, *, because: str) -> None:
        """Note in the log of rank 0 that it was the data which made a step stand out.

        Args:
            step: its number; it has come out the same when other ranks computed it once more.
            because: how it stood out, in words.
        """
        if self.seat is not None and self.seat.rank == 0:
            print(  # noqa: T201 - the rank's log
                f"step {step}: {because}; other ranks get the same: it is the data",
                file=sys.stderr,
            )

    def threw_away(self, step: int, *, because: str) -> None:
        """Note in the log of rank 0 that a step is computed again, before it moved anything.

        Args:
            step: its number.
            because: what was wrong with it, in words; nobody can be named for that.
        """
        if self.seat is not None and self.seat.rank == 0:
            print(  # noqa: T201 - the rank's log
                f"step {step} is thrown away and computed again: {because}", file=sys.stderr
            )

    def repaired(
        self, step: int, *, rank: int, source: int, tensors: Sequence[str], seconds: float
    ) -> None:
        """Report that a rank held something else than most; one or two should tell.

        Args:
            step: that is begun anew for it, and has moved nothing.
            rank: who.
            source: whose state it was given, and holds now; itself, if it has computed it again.
            tensors: what it was given, by kind and name; none if the state was the same after all.
            seconds: since the step began.
        """
        self._send(
            Repaired(
                generation=self._generation,
                step=Step(step),
                ranks=(Rank(rank),),
                source=Rank(source),
                tensors=tuple(tensors),
                seconds=seconds,
            )
        )

    def repairing(self, step: int, *, rank: int, source: int, tensors: Sequence[str]) -> None:
        """Report that a rank is about to be given what others hold: it may die of that.

        Args:
            step: before which moved anything.
            rank: who.
            source: whose state it is given.
            tensors: what of it, by kind and name.
        """
        self._send(
            Repaired(
                generation=self._generation,
                step=Step(step),
                ranks=(Rank(rank),),
                source=Rank(source),
                tensors=tuple(tensors),
                begun=True,
            )
        )

    def not_repaired(self, step: int, *, because: str) -> None:
        """Report why state that differs stays so; what follows from that, digests say.

        Args:
            step: before which moved anything.
            because: why, in words.
        """
        self._send(Repaired(generation=self._generation, step=Step(step), problem=because))

    def detector_failed(self, detector: str, reason: str) -> None:
        """Report that this rank goes on without something that looks for wrong state.

        Args:
            detector: its name.
            reason: why, in words; usually what it raised.
        """
        self._send(DetectorOff(generation=self._generation, detector=detector, reason=reason))

    def _announce_stepped(self) -> None:
        if not self._stepped:
            self._stepped = True
            self.reached("stepped")

    # State --------------------------------------------------------------------------------

    def restore_view(self, restore: Restore) -> memoryview:
        """Map the body of the shard to continue from, read-only."""
        return restore_view(restore.path)

    def restore_reader(
        self, restore: Restore
    ) -> AbstractContextManager[Callable[[int, memoryview], int]]:
        """Open the body of the shard to continue from: what fills a buffer from a place on.

        Bytes that are read into where they are to be, and verified there, come at half the cost of
        those that are verified in a view and copied out of it.
        """
        return restore_reader(restore.path)

    def slot(self, size: int) -> Slot | None:
        """Return a staging slot of `size` bytes, or None if none is free or there is no room.

        Without a slot a save is skipped, never awaited. Best skip it on all ranks: a step is of
        use only if every rank has it, and `give_back` is for those that had a slot.
        """
        assert self.seat is not None, "no seat taken"
        return self._slots.claim(size)

    def give_back(self, slot: Slot) -> None:
        """Return a slot unused."""
        self._slots.give_back(slot.number)

    def stage(
        self,
        slot: Slot,
        copy: Copy,
        seal: Seal,
        *,
        step: int,
        durable: bool,
        overlap: bool = False,
    ) -> None:
        """Fill a slot, digest what is in it, and hand it over to the agent; counts as a stall.

        With `overlap` that is done in a thread, beside forward and backward of the next step. Then
        call `await_copied` right before the next update, and before anything else that writes to
        the state: what was not waited for is not handed over, and `step_done` refuses the step that
        moved it. `copy` should let go of the interpreter's lock, or training stands still for all
        of it: numpy's and torch's copies do, that of a memoryview does not.

        A copy that is not made in time (`Seat.save_within_s`) is given up, and so is a save before
        which another one is still under way: they are counted, and training goes on.

        Args:
            slot: to fill; it is the agent's from then on.
            copy: copies the state into the slot's memory; nothing else may read the state there.
            seal: digests it there and returns its index, such as `storage.shard.seal` makes one.
            step: steps that the state has.
            durable: whether it is meant for the durable tier, too.
            overlap: whether to go on at once.

        Raises:
            MisconfiguredError: if the save before was not waited for.
        """
        generation = self._generation
        begun = time.monotonic()
        assert self.seat is not None, "no seat taken"
        within_s, before = self.seat.save_within_s, self._staging
        if before is not None:
            before.require_waited(step)
            if not before.ends(0.0 if before.given_up else within_s):
                self.give_back(slot)
                reason = f"the save of step {before.step} is not over yet"
                self.abandoned(step, generation=generation, reason=reason)
                return

        def hand_over(index: str) -> None:
            self.staged(slot, generation=generation, step=step, index=index, durable=durable)

        def give_back() -> None:
            self.give_back(slot)

        staging = Staging(slot, step, copy, seal, hand_over, give_back, within_s=within_s)
        staging.start()
        self._staging = staging
        if not overlap and self._wait_for(staging):
            staging.ends(within_s)
        self.stalled(time.monotonic() - begun)

    def await_copied(self) -> None:
        """Return once the state may be written to again that `stage` copies; counts as a stall.

        A copy that is not made in time is given up: of that step nothing is handed over, which is
        counted, and training goes on.

        Raises:
            Aborted: if this generation is over.
            BaseException: what its `copy` raised.
        """
        if self._staging is not None:
            begun = time.monotonic()
            self._wait_for(self._staging)
            self.stalled(time.monotonic() - begun)

    def _wait_for(self, staging: Staging) -> bool:
        known = staging.given_up
        copied = staging.wait(self.check)
        if not copied and not known:
            reason = f"the state of step {staging.step} was not copied in time"
            self.abandoned(staging.step, generation=self._generation, reason=reason)
        return copied

    def staged(self, slot: Slot, *, generation: int, step: int, index: str, durable: bool) -> None:
        """Hand a filled and digested slot over to the agent. Any thread."""
        if durable:
            self._orders.staged(Step(step))
        self._send(
            Staged(
                generation=Generation(generation),
                step=Step(step),
                slot=slot.number,
                index=index,
                durable=durable,
            )
        )

    def abandoned(self, step: int, *, generation: int, reason: str) -> None:
        """Say that of a step nothing is handed over after all; it is counted. Any thread.

        Args:
            step: of the save.
            generation: that it was begun in.
            reason: why, in words.
        """
        self._send(
            Abandoned(generation=Generation(generation), step=Step(step), reason=reason[:2000])
        )

    def stalled(self, seconds: float) -> None:
        """Add to the time for which saving kept training waiting."""
        self._beacon.update(stall_s=self._beacon.now.stall_s + seconds)

    @property
    def cadence(self) -> Cadence | None:
        """How often to save, as far as this rank was told; None for as the job says.

        Only rank 0 is told of a change within a generation. Best have ranks hear of it from each
        other in a step, and all act on it from the next one on: a step is of use only if every
        rank has saved it.
        """
        assert self.seat is not None, "no seat taken"
        told = self._orders.save_every
        if told is not None and told.generation == self.seat.generation:
            return told.cadence
        return self.seat.cadence

    @property
    def persisting(self) -> bool:
        """Whether a shard of this rank is still on its way to the durable tier.

        While one is, no other begins. Best have a step made durable by all ranks or by none: ranks
        that skipped steps one by one could leave none that is whole.
        """
        return self._orders.persisting

    def await_persisted(self, step: int, timeout_s: float) -> bool:
        """Wait until this rank's shard of `step` is durable; False after `timeout_s`.

        False at once if it was given up.
        """
        persisted = self._orders.await_persisted(Step(step), timeout_s)
        self.check()
        return persisted

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
