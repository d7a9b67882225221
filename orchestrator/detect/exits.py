"""Finds ranks whose process ended: what ended it, whose fault that is, and what it said last."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

import msgspec

from orchestrator.core.events import Event
from orchestrator.core.incident import UNRESTORABLE, Cause, Finding
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Generation, NodeId, Seconds
from orchestrator.protocol.messages import RankExited
from orchestrator.protocol.phases import RankPhase

_FRAME = re.compile(r'^\s+File "([^"]+)", line (\d+), in (\S+)', re.MULTILINE)


class Exits:
    """Every unexpected exit is a finding; one of a generation that is over adds to its incident.

    Each is told once: a world may lose thousands of ranks within a second, and an event that
    went through all of them again would keep the controller from its work.
    """

    name = "exits"

    def __init__(self) -> None:
        self._generation = Generation(0)
        self._told = self._told_late = 0
        """How many of the exits that the state has, in the order in which it has them."""

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return one finding per rank that ended since it was last asked."""
        del event  # the state has it all
        if state.generation != self._generation:
            self._generation = state.generation
            self._told = self._told_late = 0
        exits = [
            _finding(exit_, state.seats[exit_.rank], at)
            for exit_, at in zip(
                state.exits[self._told :], state.exited_at[self._told :], strict=True
            )
        ]
        late = [
            msgspec.structs.replace(_finding(exit_, node, at), generation=exit_.generation)
            for at, node, exit_ in state.late_exits[self._told_late :]
        ]
        self._told, self._told_late = len(state.exits), len(state.late_exits)
        return exits + late


def _finding(exit_: RankExited, node: NodeId, at: Seconds) -> Finding:
    kind, cause, words = classify(exit_)
    phase = RankPhase(exit_.phase).name.lower()
    # What a job says of itself may have several lines, the last of them a hint: it ends ours.
    own = f": {exit_.message}" if exit_.misconfigured else ""
    return Finding(
        at=at,
        since=at,
        kind=kind,
        cause=cause,
        ranks=(exit_.rank,),
        nodes=(node,),
        step=exit_.step,
        evidence=f"rank {exit_.rank} on {node} {words} in {phase} after step {exit_.step}{own}",
        signature=signature(exit_),
        detail=exit_.traceback,
    )


def classify(exit_: RankExited) -> tuple[str, Cause, str]:
    """Return (kind, cause, what happened in words) of an exit.

    A signal alone does not say whose fault it is: SIGKILL is the kernel's out-of-memory killer as
    well as an operator, SIGSEGV a bug as well as bad memory.
    """
    if exit_.misconfigured:
        return "misconfigured", Cause.SOFTWARE, "refused its job"
    if exit_.unrestorable:
        return UNRESTORABLE, Cause.STORAGE, f"can not read its state: {_first_line(exit_.message)},"
    if exit_.kind:
        return "exception", Cause.SOFTWARE, f"raised {exit_.kind}: {_first_line(exit_.message)}"
    if exit_.code < 0:
        name = _signal_name(-exit_.code)
        cause = Cause.PREEMPTION if name == "SIGTERM" else Cause.UNKNOWN
        return "crash", cause, f"was ended by signal {-exit_.code} ({name})"
    return "crash", Cause.SOFTWARE, f"exited with code {exit_.code}"


def signature(exit_: RankExited) -> str:
    """Return what another occurrence of the same fault would share, "" if it would share nothing.

    SIGKILL and SIGTERM come from outside and carry no mark of the program; nor does a store that
    refuses: it is the same wherever the job is put, and whatever the job is.
    """
    if exit_.unrestorable or exit_.code in (-signal.SIGKILL, -signal.SIGTERM):
        return ""
    frames = _FRAME.findall(exit_.traceback)
    where = ":".join(frames[-1]) if frames else ""
    what = exit_.kind or f"exit {exit_.code}"
    return f"{what} at {where}" if where else what


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _first_line(text: str) -> str:
    return text.splitlines()[0][:200] if text else "no message"
