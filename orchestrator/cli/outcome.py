"""How `holdfast run` ended: the exit code, and if it is not 0, what a person is told and may do."""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.cli import units
from orchestrator.cli.errors import Exit
from orchestrator.core.state import RunState
from orchestrator.worlds.folder import RunFolder

_GOES_ON = "`holdfast run` with the same file goes on from the newest checkpoint"


class Outcome(NamedTuple):
    """The end of a run as its command tells it."""

    code: Exit
    message: str = ""
    hint: str = ""


def outcome(state: RunState | None, folder: RunFolder, timed_out_s: float | None) -> Outcome:
    """Return how a run ended.

    Args:
        state: as it was last; None if it has no journal.
        folder: of the run.
        timed_out_s: the limit that `--timeout` set, if that is why it was ended.
    """
    end = state.end_state if state is not None else ""
    if end == "Succeeded":
        return Outcome(Exit.OK)
    where = f"{_position(state)}: {folder.root}"
    if timed_out_s is not None:
        return Outcome(
            Exit.TIMED_OUT,
            f"the run did not end within --timeout {timed_out_s:g} s, it was {where}",
            f"allow it more; {_GOES_ON}",
        )
    if state is not None and end == "Failed":
        reason, _, hint = units.printable(state.end_reason).partition("\nhint: ")
        refused = state.incident is not None and state.incident.kind == "misconfigured"
        return Outcome(
            Exit.USAGE if refused else Exit.RUN_FAILED,
            f"run {state.run.metadata.name} failed: {reason.rstrip()}\nit was {where}",
            hint or f"`holdfast describe incident --run {folder.root}`; {_GOES_ON}",
        )
    why = units.printable(state.end_reason) if state is not None and end else "interrupted"
    return Outcome(Exit.INTERRUPTED, f"{why}; it was {where}", _GOES_ON)


def _position(state: RunState | None) -> str:
    if state is None:
        return "not begun"
    return f"at step {state.reached_step} of {state.run.spec.trainer.steps}"
