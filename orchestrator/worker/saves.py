"""How a rank keeps its state: the slots that it fills, and what it tells of its saves."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.rank import Abandoned, Restore, Staged
from orchestrator.worker.beacon import BeaconWriter
from orchestrator.worker.connection import Connection
from orchestrator.worker.slot import Slot, restore_reader, restore_view
from orchestrator.worker.staging import Copy, Seal, Staging


class Saves(Connection):
    """One rank's."""

    def __init__(self, control: socket.socket, beacon: BeaconWriter, memory: Path) -> None:
        super().__init__(control, beacon, memory)
        self._staging: Staging | None = None

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
