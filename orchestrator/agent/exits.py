"""What is told of a rank that ended: by what, where it was, and what it said last."""

from __future__ import annotations

import signal
import traceback
from pathlib import Path

from orchestrator.agent import importing
from orchestrator.agent.live import LiveRank
from orchestrator.agent.warm import WarmUpError
from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.messages import RankExited
from orchestrator.protocol.phases import RankPhase

MESSAGE_MAX = 4000
TRACEBACK_MAX = 32_000
TAIL_MAX_BYTES = 8000
NODE_HINT = "Look at what this node has left: shared memory, disk, open files, processes."
_SPEAKING = frozenset(
    -number
    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
)
"""Signals on which faulthandler prints a traceback. SIGKILL leaves nothing to be printed."""


def exited(live: LiveRank, code: int) -> RankExited:
    """Return the fact that a seated process ended without having been told to.

    If it could not say why itself, the end of what it printed since it got its seat has to do.
    """
    assert live.seat is not None
    reading = live.read()
    here = reading is not None and reading.generation == live.seat.generation
    restored = live.seat.restore.step if live.seat.restore else Step(0)
    words = live.last_words
    said = words.traceback[-TRACEBACK_MAX:] if words else ""
    if not words and (code > 0 or code in _SPEAKING):
        said = _tail(live.seat.log, live.log_from)
    return RankExited(
        generation=live.seat.generation,
        rank=live.seat.rank,
        pid=live.pid,
        code=code,
        phase=int(reading.phase) if here and reading else int(RankPhase.STARTING),
        step=reading.step if here and reading else restored,
        kind=words.kind[:200] if words else "",
        message=words.message[:MESSAGE_MAX] if words else "",
        traceback=said,
        misconfigured=words.misconfigured if words else False,
        unrestorable=words.unrestorable if words else False,
    )


def not_seated(
    error: Exception, entrypoint: str, generation: Generation, rank: Rank, step: Step
) -> RankExited:
    """Return the fact that there is no process for `rank`, in the form of one that ended at once.

    A job whose trainer is not installed can not run as it is. Any other failure (a library that
    can not be loaded, a full memory, a file system that hung) may be this node's alone, and is
    worth another attempt.
    """
    answer = error.answer if isinstance(error, WarmUpError) else None
    hint = error.hint if isinstance(error, WarmUpError) else NODE_HINT
    if answer is not None:
        hint = importing.advice(answer) or hint
    return RankExited(
        generation=generation,
        rank=rank,
        pid=answer.pid if answer else 0,
        code=1,
        phase=int(RankPhase.STARTING),
        step=step,
        kind=answer.kind[:200] if answer else type(error).__name__,
        message=f"{answer.message if answer else error}"[:MESSAGE_MAX] + f"\nhint: {hint}",
        traceback=(answer.traceback if answer else _traceback(error))[-TRACEBACK_MAX:],
        misconfigured=answer is not None and importing.misconfigured(answer, entrypoint),
    )


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


def _tail(path: str, start: int) -> str:
    if not path:
        return ""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - TAIL_MAX_BYTES))
            return file.read(TAIL_MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
