"""Finds generations that can not start: the state that they continue from is unreadable."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.events import Event
from orchestrator.core.incident import UNRESTORABLE, Cause, Finding
from orchestrator.core.state import RunState


class Preparation:
    """What could not be read has been struck off the list; the next generation takes another."""

    name = "preparation"

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return one finding if a node could not bring the state to its memory."""
        del event  # the state has it all
        if not state.failed_preparation:
            return []
        return [
            Finding(
                at=state.now,
                since=state.phase_since,
                kind=UNRESTORABLE,
                cause=Cause.STORAGE,
                step=state.start_step,
                evidence=f"state of step {state.start_step} can not be restored: "
                f"{state.failed_preparation}",
            )
        ]
