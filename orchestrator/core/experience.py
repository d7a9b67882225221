"""What this run has seen of what saving costs, and of how often it is interrupted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.core.incident import Cause, Incident
from orchestrator.protocol.ids import Seconds, Step

SAVES_MAX = 256
"""Beyond so many saves, what older ones cost counts half: costs change with the world."""
LATENCIES_MAX = 32


@dataclass(slots=True)
class Experience:
    """Of one life of a run. Seconds of the run's clock."""

    since: Seconds | None = None
    """When the first step was complete; None before."""
    saves: float = 0.0
    """That were due, older ones counted less."""
    stall_s: float = 0.0
    """For which they kept training waiting, likewise."""
    copy_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_MAX))
    """From the end of a step until it is known that two nodes' memory has its state, of the newest
    saves."""
    write_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_MAX))
    """From the end of a step until it is known that its checkpoint exists, likewise."""
    interruptions: int = 0
    """Since the first step, but for planned ones."""
    deep: int = 0
    """Those of them after which memory was of no use."""

    @property
    def stall_mean_s(self) -> float:
        """For how long a save keeps training waiting; 0 before the first."""
        return self.stall_s / self.saves if self.saves else 0.0

    def saved(self, saves: int, stall_s: float) -> None:
        """Take in that so many saves were due, and that training waited for them.

        The two may come apart by a beat: over many saves that does not matter.
        """
        self.saves += saves
        self.stall_s += stall_s
        if self.saves > SAVES_MAX:
            self.saves, self.stall_s = self.saves / 2, self.stall_s / 2

    def interrupted(self, incidents: Iterable[Incident], *, deep: bool) -> None:
        """Take in what a restart is for: however many incidents, it is one interruption.

        Args:
            incidents: that are open.
            deep: whether memory was of no use.
        """
        new = [incident for incident in incidents if incident.decided_at is None]
        if self.since is None or all(incident.cause is Cause.PLANNED for incident in new):
            return
        self.interruptions += 1
        self.deep += deep


def latency_s(log: deque[tuple[Step, Seconds]], step: Step, now: Seconds) -> float | None:
    """Return how long ago a step was complete; None if that is not known any more."""
    for known, at in reversed(log):
        if known <= step:
            return now - at if known == step else None
    return None
