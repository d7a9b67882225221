"""When a restart that may choose its moment costs least: right after memory has a newer step.

What is held on two nodes survives whatever the restart does, and hardly a step was made since.
"""

from __future__ import annotations

from orchestrator.core.copies import newest_safe_step
from orchestrator.core.phases import RunPhase
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Seconds, Step

STILL_SAVES = 3
"""Memory that has held no newer step for as long as this many saves take is not waited for."""


class Moment:
    """Watches for it while somebody waits for it; forget it while nobody does."""

    def __init__(self) -> None:
        self._held: Step | None = None
        """Which step memory has on two nodes; None while nobody waits for a better moment."""
        self._held_at = Seconds(0.0)
        """Since when it has nothing newer, or somebody waits."""

    def forget(self) -> None:
        """Nobody waits."""
        self._held = None

    def good(self, state: RunState) -> str:
        """Say why going on from memory loses as little now as it ever will; "" if it does not."""
        # Not one event later, when it is retained: the next one may be a whole save away.
        held = max(state.retained, newest_safe_step(state) or state.retained)
        newer = self._held is not None and held > self._held
        if held != self._held:
            self._held, self._held_at = held, state.now
        newest_commit = max(state.sound_commits, default=Step(-1))
        # A restart now would be one more in a row that brings no new step.
        if held < newest_commit or state.futile_restarts:
            return ""
        if held == state.reached_step and _just_reached(state):
            return f"memory has step {held}, which was just reached"
        # Saves take longer than a step: it will not come any closer than this.
        return f"memory has just come to have step {held}" if newer else ""

    def still(self, state: RunState) -> str:
        """Say for how long memory has come to hold nothing newer; "" if that is to be expected."""
        step_s = state.step_times.quantile(0.99)
        limit_s = STILL_SAVES * state.cadence.memory * step_s
        limit_s = max(limit_s, state.timeouts.form_s)
        still_s = state.now - self._held_at
        if still_s <= limit_s:
            return ""
        return f"memory has had nothing newer for {still_s:.1f} s, limit {limit_s:.1f} s"


def trains(state: RunState) -> bool:
    """Whether it is known that the run trains and nothing else is the matter."""
    return (
        state.phase is RunPhase.TRAINING
        and not state.wanting
        and state.incident is None
        and state.reached_step > state.start_step
        # After a controller died: seen by this one, not only by the one before.
        and state.step_log[-1][1] > state.took_over_at
    )


def _just_reached(state: RunState) -> bool:
    """Whether no step can have been made since the last that is known of."""
    return state.now - state.step_log[-1][1] <= state.step_times.quantile(0.5)
