"""How a rank shows how far it is: phases, collectives, and steps that are done."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from orchestrator.protocol.groups import ALL
from orchestrator.protocol.ids import Step
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import Probed, Speed
from orchestrator.worker.beacon import GROUPS_MAX, BeaconWriter, StepRecord
from orchestrator.worker.probing import measure
from orchestrator.worker.saves import Saves


class Steps(Saves):
    """One rank's; a step has to know whether it moved what a save was still copying.

    Attributes:
        probe: measures how fast this rank's device is within so many seconds, when the agent asks;
            a program that computes elsewhere than on a processor sets one of its own.
    """

    def __init__(self, control: socket.socket, beacon: BeaconWriter, memory: Path) -> None:
        super().__init__(control, beacon, memory)
        self._stepped = False
        self._waited_s = 0.0
        self._slots_of: dict[str, int] = {}
        """Where the beacon counts the collectives of each group."""
        self.probe: Callable[[float], Speed] = measure

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

    def entered_collective(self, group: str | None = ALL, what: str = "") -> None:
        """Count one collective entered; names the rank that never joined when others hang.

        Args:
            group: whose it is, one of `in_groups`; None if that is not known.
            what: what it is, such as `allreduce of 4096 B`, in the words of every rank that enters
                the same one: who enters another one than the others is named for it.
        """
        self._beacon.enter(self._slots_of.get(group) if group is not None else None, what)

    def left_collective(self, group: str | None = ALL) -> None:
        """Count one collective left: until then, this rank waits in it for who has not entered."""
        self._beacon.leave(self._slots_of.get(group) if group is not None else None)

    @contextlib.contextmanager
    def waiting(self, group: str | None = ALL, what: str = "") -> Iterator[None]:
        """Count the time in this block as waiting for peers, not as computing.

        Put it around each collective: who is slow is told by who lets the others wait, and who
        hangs by who has not entered what the others wait in.

        Args:
            group: whose collective it is, one of `in_groups`; without it, one of all ranks.
            what: as in `entered_collective`.
        """
        begun = time.monotonic()
        self.entered_collective(group, what)
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

    def _announce_stepped(self) -> None:
        if not self._stepped:
            self._stepped = True
            self.reached("stepped")
