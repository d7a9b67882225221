"""What a restart takes in this run, as far as is known: whoever weighs one against a loss asks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from orchestrator.core.state import RunState

RESTARTS_KNOWN = 5
"""So many of the newest restarts say what one takes."""


def restart_s(state: RunState) -> float:
    """Return what a restart takes, from the decision to the first step, seconds.

    The median of the newest, the lower one of two: the world changes, so that old ones say little,
    and one that was stuck says nothing about the next.
    """
    took_s = sorted(islice(_restarts_s(state), RESTARTS_KNOWN))
    return took_s[(len(took_s) - 1) // 2] if took_s else state.timeouts.form_s


def _restarts_s(state: RunState) -> Iterator[float]:
    """Yield what each restart took that came to an end, the newest first."""
    for incident in reversed(state.incidents):
        if incident.restarted_as and incident.resumed_at and incident.decided_at is not None:
            yield max(incident.resumed_at - incident.decided_at, 0.0)
