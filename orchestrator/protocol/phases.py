"""What a rank can be doing, as it says so itself in its beacon."""

from enum import IntEnum


class RankPhase(IntEnum):
    """A rank's announced phase; the order is the order within a life and within a step.

    A phase is a promise about waiting: `patient` phases may stand still for long without
    being hung (they are bounded by the limit of that phase instead of the step deadline).
    """

    STARTING = 0
    """The process exists and has not taken a seat yet."""
    WAITING = 1
    """Between generations: it left (or never had) a world and waits for a seat."""
    RENDEZVOUS = 2
    """It has a seat and forms the world with its peers."""
    RESTORING = 3
    """The world stands; state is being built and read."""
    WARMING = 4
    """The first step of a process: compilation, allocation, autotuning."""
    DATA = 5
    FORWARD = 6
    BACKWARD = 7
    OPTIMIZER = 8
    CHECKPOINT = 9
    """Staging its shard; training stands still for as long as this lasts."""
    EVALUATING = 10
    """Looking at what it has learned, or at how fast it is; nobody trains meanwhile."""
    FINISHING = 11
    """All steps done: final save, digest, farewell."""
    DONE = 12

    @property
    def patient(self) -> bool:
        """Whether standing still in this phase is announced, hence no hang by itself."""
        return self not in _IMPATIENT


_IMPATIENT = frozenset({RankPhase.DATA, RankPhase.FORWARD, RankPhase.BACKWARD, RankPhase.OPTIMIZER})
