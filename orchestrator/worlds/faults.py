"""Keeps track of a fault plan in a world: what is left, and what is due that no agent watches.

Agents watch the steps of their own ranks, to the step. What is timed by the clock, aimed at the
controller, or at a node without ranks, is due here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from orchestrator.faults.catalogue import CATALOGUE
from orchestrator.faults.plan import ArmedFault, Fault
from orchestrator.protocol.ids import NodeId, Seconds, Step
from orchestrator.protocol.runfile import seconds


class Schedule:
    """The faults of a plan that happen, by index."""

    def __init__(self, faults: Sequence[ArmedFault]) -> None:
        self._left = {fault.index: fault for fault in faults}
        self._all = dict(self._left)
        self._carried_out: set[int] = set()
        self._first_step_at: Seconds | None = None

    def resume(self, injected: AbstractSet[int], carried_out: AbstractSet[int]) -> None:
        """Strike off what a journal says has been let loose already."""
        for index in injected:
            self._left.pop(index, None)
        self._carried_out |= carried_out

    def left(self) -> list[ArmedFault]:
        """Return the faults that are still to come, by index."""
        return [fault for _, fault in sorted(self._left.items())]

    def asked_for(self, index: int) -> ArmedFault | None:
        """Return the fault that an agent says is due; None if it has been carried out before.

        One that is on record but not confirmed is asked for again when its order was lost.
        """
        return None if index in self._carried_out else self._all.get(index)

    def confirm(self, index: int) -> None:
        """Note that an agent has carried out a fault: whoever holds the rank next must not."""
        self._carried_out.add(index)

    def injected(self, index: int) -> None:
        """Note that a fault is on record."""
        self._left.pop(index, None)

    def due(self, now: Seconds, reached: Step, seated: AbstractSet[NodeId]) -> list[ArmedFault]:
        """Return the faults that are due now and that no agent watches for."""
        if self._first_step_at is None and reached > 0:
            self._first_step_at = now
        return [armed for armed in self.left() if self._is_due(armed.fault, now, reached, seated)]

    def end_this_process(self) -> None:
        """Do to the controller what `kill-controller` says."""
        os.kill(os.getpid(), signal.SIGKILL)

    def _is_due(
        self, fault: Fault, now: Seconds, reached: Step, seated: AbstractSet[NodeId]
    ) -> bool:
        if fault.when.after is not None:
            since = self._first_step_at
            return since is not None and now - since >= seconds(fault.when.after)
        assert fault.when.step is not None, "a plan without a moment was not refused"
        if CATALOGUE[fault.fault].target == "controller":
            return reached >= fault.when.step
        watched = fault.rank is not None or fault.node in seated
        return not watched and reached >= fault.when.step
