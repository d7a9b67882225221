"""Keeps track of a fault plan in a world: what is left, and what is due that no agent watches.

Agents watch the steps of their own ranks, to the step. What is timed by the clock, aimed at the
controller, or at a node without ranks, is due here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from orchestrator.core.events import Event, FaultInjected, Reported, Telemetry
from orchestrator.faults.catalogue import CATALOGUE
from orchestrator.faults.plan import ArmedFault, Fault
from orchestrator.protocol.ids import NodeId, Seconds, Step
from orchestrator.protocol.messages import FaultCarriedOut
from orchestrator.protocol.runfile import seconds


class Schedule:
    """The faults of a plan that happen, by index."""

    def __init__(self, faults: Sequence[ArmedFault]) -> None:
        self._left = {fault.index: fault for fault in faults}
        self._all = dict(self._left)
        self._ordered: dict[int, NodeId] = {}
        self._carried_out: set[int] = set()
        self._first_step_at: Seconds | None = None

    def resume(self, events: Iterable[Event]) -> None:
        """Take over what a journal says of faults, and when the run did its first step."""
        for event in events:
            match event:
                case FaultInjected(index=index, node=node):
                    self.injected(index, node)
                case Reported(fact=FaultCarriedOut(index=index)):
                    self.confirm(index)
                case Telemetry(at=at, reports=reports) if reports and self._first_step_at is None:
                    self._first_step_at = at
                case _:
                    pass

    def left(self) -> list[ArmedFault]:
        """Return the faults that are still to come, by index."""
        return [fault for _, fault in sorted(self._left.items())]

    def asked_for(self, index: int, by: NodeId) -> ArmedFault | None:
        """Return the fault that an agent says is due; None if there is nothing to put on record.

        One that was ordered of another node and never confirmed may have been lost with it. One
        that was ordered of this node is `owed` to it: it has been sent on each of its connections.
        """
        if index in self._carried_out or self._ordered.get(index) == by:
            return None
        return self._all.get(index)

    def confirm(self, index: int) -> None:
        """Note that an agent has carried out a fault: whoever holds the rank next must not."""
        self._carried_out.add(index)

    def injected(self, index: int, node: NodeId) -> None:
        """Note that a fault is on record, to be carried out by `node`; "" for the controller."""
        self._left.pop(index, None)
        self._ordered[index] = node

    def owed(self, node: NodeId) -> list[int]:
        """Return what is on record for a node that has not confirmed it: the order may be lost."""
        return sorted(
            index
            for index, ordered in self._ordered.items()
            if ordered == node and index not in self._carried_out
        )

    def due(
        self, now: Seconds, reached: Step, seated: AbstractSet[NodeId], ranks: int
    ) -> list[ArmedFault]:
        """Return the faults that are due now and that no agent watches for.

        What is aimed at a rank is due once there is one: of `ranks`, while replicas are missing.
        """
        if self._first_step_at is None and reached > 0:
            self._first_step_at = now
        return [
            armed
            for armed in self.left()
            if (armed.fault.rank or 0) < ranks and self._is_due(armed.fault, now, reached, seated)
        ]

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
