"""What a rank needs to be supervised: beacon, abort, staging. No torch, usable from any trainer."""

from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import Restore, Seat
from orchestrator.worker.sdk import (
    EXIT_MISCONFIGURED,
    Aborted,
    MisconfiguredError,
    NotSupervisedError,
    PeerLostError,
    Slot,
    Worker,
    serve,
)

__all__ = [
    "EXIT_MISCONFIGURED",
    "Aborted",
    "MisconfiguredError",
    "NotSupervisedError",
    "PeerLostError",
    "RankPhase",
    "Restore",
    "Seat",
    "Slot",
    "Worker",
    "serve",
]
