"""The life of a run as a table: which phase may follow which, and what its time is charged to.

docs/states.md is drawn from this table (`python -m orchestrator.core.phases`); a test compares.
"""

from __future__ import annotations

from enum import StrEnum


class RunPhase(StrEnum):
    """What a run is doing, seen from the controller."""

    GATHERING = "Gathering"
    """Waiting until enough nodes are there."""
    BACKING_OFF = "BackingOff"
    """Waiting before a restart, since the one before it brought no new step."""
    SEARCHING = "Searching"
    """The durable tier is searched for a checkpoint to continue from."""
    STOPPING = "Stopping"
    """A new generation is ordered; what is left of the old one is leaving."""
    STARTING = "Starting"
    """The old one is gone; missing processes start and state is fetched."""
    FORMING = "Forming"
    """Every rank has its seat; process groups form."""
    RESTORING = "Restoring"
    """The world stands; ranks build the model and read their state."""
    WARMING = "Warming"
    """The first step of the generation."""
    TRAINING = "Training"
    FINISHING = "Finishing"
    """Every rank is done; the last checkpoint is being committed."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    STOPPED = "Stopped"

    @property
    def final(self) -> bool:
        """Whether the run is over."""
        return not TRANSITIONS[self]


class Bucket(StrEnum):
    """What a second of a run was spent on. Every second is in exactly one."""

    EFFECTIVE = "effective"
    """Steps that are part of the final result."""
    LOST_WORK = "lost_work"
    """Steps that were computed and then rolled back."""
    LOST_CAPACITY = "lost_capacity"
    """By which training with fewer replicas falls short of full speed: 1 s of a step that takes 8 s
    and would take 7 s with all of them."""
    CHECKPOINT_STALL = "checkpoint_stall"
    STARTUP = "startup"
    """Before the first step of the run."""
    DETECT = "detect"
    """From the last progress (or the death) until the controller knew."""
    DECIDE = "decide"
    """From knowing to ordering: searching checkpoints."""
    BACKOFF = "backoff"
    WAIT_FOR_NODES = "wait_for_nodes"
    STOP = "stop"
    START = "start"
    RENDEZVOUS = "rendezvous"
    RESTORE = "restore"
    FIRST_STEP = "first_step"
    SHUTDOWN = "shutdown"


P = RunPhase
TRANSITIONS: dict[RunPhase, tuple[RunPhase, ...]] = {
    P.GATHERING: (P.SEARCHING, P.BACKING_OFF, P.STOPPING, P.SUCCEEDED, P.FAILED, P.STOPPED),
    P.BACKING_OFF: (P.SEARCHING, P.STOPPING, P.GATHERING, P.SUCCEEDED, P.FAILED, P.STOPPED),
    P.SEARCHING: (P.STOPPING, P.GATHERING, P.BACKING_OFF, P.SUCCEEDED, P.FAILED, P.STOPPED),
    P.STOPPING: (P.STARTING, P.SEARCHING, P.STOPPING, P.GATHERING, P.BACKING_OFF, P.FAILED,
                 P.STOPPED),
    P.STARTING: (P.FORMING, P.SEARCHING, P.STOPPING, P.GATHERING, P.BACKING_OFF, P.FAILED,
                 P.STOPPED),
    P.FORMING: (P.RESTORING, P.SEARCHING, P.STOPPING, P.GATHERING, P.BACKING_OFF, P.FAILED,
                P.STOPPED),
    P.RESTORING: (P.WARMING, P.SEARCHING, P.STOPPING, P.GATHERING, P.BACKING_OFF, P.FAILED,
                  P.STOPPED),
    P.WARMING: (P.TRAINING, P.FINISHING, P.SEARCHING, P.STOPPING, P.GATHERING, P.BACKING_OFF,
                P.FAILED, P.STOPPED),
    P.TRAINING: (P.FINISHING, P.SEARCHING, P.STOPPING, P.GATHERING, P.BACKING_OFF, P.FAILED,
                 P.STOPPED),
    P.FINISHING: (P.SUCCEEDED, P.SEARCHING, P.STOPPING, P.GATHERING, P.BACKING_OFF, P.FAILED,
                  P.STOPPED),
    P.SUCCEEDED: (),
    P.FAILED: (),
    P.STOPPED: (),
}  # fmt: skip

BUCKET_OF: dict[RunPhase, Bucket] = {
    P.GATHERING: Bucket.WAIT_FOR_NODES,
    P.BACKING_OFF: Bucket.BACKOFF,
    P.SEARCHING: Bucket.DECIDE,
    P.STOPPING: Bucket.STOP,
    P.STARTING: Bucket.START,
    P.FORMING: Bucket.RENDEZVOUS,
    P.RESTORING: Bucket.RESTORE,
    P.WARMING: Bucket.FIRST_STEP,
    P.TRAINING: Bucket.EFFECTIVE,
    P.FINISHING: Bucket.SHUTDOWN,
    P.SUCCEEDED: Bucket.SHUTDOWN,
    P.FAILED: Bucket.SHUTDOWN,
    P.STOPPED: Bucket.SHUTDOWN,
}
"""While no step of the run has ever completed, all of it is `startup` instead."""

PHASE_OF_MARK: tuple[RunPhase, ...] = (
    P.STOPPING,
    P.STARTING,
    P.FORMING,
    P.RESTORING,
    P.WARMING,
    P.TRAINING,
    P.FINISHING,
)
"""The phase of a generation whose least advanced node has reached a mark (protocol.MARKS)."""


def require(now: RunPhase, then: RunPhase) -> RunPhase:
    """Return `then` if it may follow `now`.

    Raises:
        ValueError: if the table does not have it; the controller's own mistake.
    """
    if then is not now and then not in TRANSITIONS[now]:
        raise ValueError(f"no transition {now} -> {then}")
    return then


def mermaid() -> str:
    """Return the table as a mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> Gathering"]
    for phase, successors in TRANSITIONS.items():
        lines += [f"    {phase} --> {after}" for after in successors if after is not phase]
        if not successors:
            lines.append(f"    {phase} --> [*]")
    return "\n".join(lines)


if __name__ == "__main__":
    print(mermaid())  # noqa: T201 - this is what the command is for
