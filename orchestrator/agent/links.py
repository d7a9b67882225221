"""How fast copies of this node's shards reach its buddy: the agent's own measure of its network.

Ranks wait for each other in every collective, so nobody can tell from their times which cable is
slow. But each node sends its shards to one other, all about as many bytes and about as often; who
takes far longer for that than everybody else has a slow way there.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from orchestrator.protocol.ids import Generation, NodeId
from orchestrator.protocol.messages import LinkTimed

COPIES = 4
"""In so many copies the median is told; one that met a busy moment is no news."""
LEAST_BYTES = 4 << 20
"""Of what is smaller most of the time is not the network's."""


class LinkTimes:
    """One node's.

    Args:
        say: tells the controller.
    """

    def __init__(self, say: Callable[[LinkTimed], None]) -> None:
        self._say = say
        self._way: tuple[Generation, NodeId] | None = None
        self._rates: list[float] = []

    def copied(self, generation: Generation, to: NodeId, size: int, seconds: float) -> None:
        """Take in that a copy of `size` bytes has arrived there, and been verified."""
        if (generation, to) != self._way:
            self._way, self._rates = (generation, to), []
        if size < LEAST_BYTES or seconds <= 0:
            return
        self._rates.append(size / seconds)
        if len(self._rates) == COPIES:
            rate = median(self._rates)
            self._rates = []
            self._say(LinkTimed(generation=generation, to=to, bytes_per_s=rate, copies=COPIES))
