"""What a rank needs to be supervised: beacon, abort, staging. No torch, usable from any trainer."""

from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import JobAhead, Restore, Seat
from orchestrator.worker.errors import (
    EXIT_MISCONFIGURED,
    EXIT_STUCK,
    Aborted,
    MisconfiguredError,
    NotSupervisedError,
    PeerLostError,
    SaveStuckError,
    UnrestorableError,
)
from orchestrator.worker.listening import LEAVE_SHARE
from orchestrator.worker.sdk import Worker
from orchestrator.worker.serving import serve
from orchestrator.worker.slot import Slot

__all__ = [
    "EXIT_MISCONFIGURED",
    "EXIT_STUCK",
    "LEAVE_SHARE",
    "Aborted",
    "JobAhead",
    "MisconfiguredError",
    "NotSupervisedError",
    "PeerLostError",
    "RankPhase",
    "Restore",
    "SaveStuckError",
    "Seat",
    "Slot",
    "UnrestorableError",
    "Worker",
    "serve",
]
