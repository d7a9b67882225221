"""The trainer, one copy of whose state is stuck, and another one cut short by the end of its rank.

Once each, in generation 1: half of the first piece is copied then.
"""

import os
import signal
import threading
from typing import Any

from orchestrator.worker import Worker
from trainer import checkpoint, staging, train

STUCK_AT, KILLED_AT = 4, 16
"""Steps that the state has."""
warm_up = train.warm_up
_copy, _save, _abandoned = staging.copy_piece, checkpoint.Checkpointer.save, Worker.abandoned
_given_up = threading.Event()
_at = [0]


def _saving(self: checkpoint.Checkpointer, keeper: Any, step: int, **how: Any) -> bool:
    _at[0] = step if self._stamp.generation == 1 else 0
    # Of others it does not matter how busy the machine is.
    staging.STILL_S = 0.1 if _at[0] == STUCK_AT else 60.0
    return _save(self, keeper, step, **how)


def _halting(target: staging.Bytes, source: staging.Bytes) -> None:
    half = len(source) // 2
    _copy(target[:half], source[:half])
    if _at[0] == KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    if _at[0] == STUCK_AT:
        _given_up.wait()
    _copy(target[half:], source[half:])


def _heard(self: Worker, step: int, **why: Any) -> None:
    _abandoned(self, step, **why)
    _given_up.set()


def main() -> int:
    staging.copy_piece = _halting
    checkpoint.Checkpointer.save = _saving  # type: ignore[method-assign]
    Worker.abandoned = _heard  # type: ignore[method-assign]
    return train.main()
