"""How fast the ways between nodes are, and what a step waits for while they are, or are not, well.

Each node tells how fast its shards reach its buddy (agent.links), so each has one way in and one
way out; in a world of an even number of nodes both lead to the same. What of a step passes while
nobody computes is more than what waits for the network: reading samples, saving, launching work are
in it, too. But those do not change with a cable. What it was while all ways were well is kept, and
what it grew by is what a slow one costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from orchestrator.protocol.ids import NodeId, Seconds

SLOW_TIMES = 3.0
"""Times as long as on the usual way. Assumed: a port that came up at a quarter of its rate, or a
cable that sends everything again, is far above; a host that is busy with something is below."""
IN_A_ROW = 3
"""Medians of copies, one after the other, all of them slow."""
NEIGHBOUR_IN_A_ROW = 2
"""So often for the other way of a node: it is told about as often, a little earlier or later."""
OTHERS_MIN = 3
"""Ways to compare with."""
SAMPLES = 200
"""Looks that are kept of what a step waits, the newest."""
KNOWN_MIN = 20
"""Looks before, and as many after, without which nobody knows what has changed."""
NOISE = 3.0
"""Standard deviations (robust, MAD) of single looks by which the median has to have grown: that of
twenty differs by a fifth of one, so that what is left is no chance."""
_MAD_TO_SIGMA = 1.4826
Way = tuple[NodeId, NodeId]


class Waited(NamedTuple):
    """For how many seconds of a step nobody computes: while all ways were well, and since then."""

    before_s: float
    now_s: float
    grown: bool
    """Whether that is more than what it differs by anyway."""


class Ways:
    """Of one generation; what was waited while all was well is that of those before it, too.

    Args:
        size: ranks of the world.
        well: of worlds of the same size.
    """

    def __init__(self, size: int = 0, well: Sequence[float] = ()) -> None:
        self.size = size
        self.rates: dict[Way, float] = {}
        """What was told last of each, bytes per second."""
        self.slow: dict[Way, int] = {}
        """How often in a row each was slow."""
        self.slow_since: Seconds | None = None
        """Since when some way has been slow, as far as was told; None while all are well."""
        self._well = deque(well, maxlen=SAMPLES)
        self._since: deque[float] = deque(maxlen=SAMPLES)
        self._unsure: tuple[deque[float], deque[float]] = deque(), deque(maxlen=SAMPLES)
        """What was waited in the last round in which all told, and in the present one: a way that
        was told to be well may have been slow ever since."""
        self._round: set[Way] = set()
        """Ways that were told to be well in the present round."""

    def renewed(self, size: int) -> Ways:
        """Return those of a new generation."""
        return Ways(size, self._well if size == self.size else ())

    def hear(self, way: Way, rate: float, at: Seconds, *, training: bool) -> None:
        """Take in how fast a way is."""
        self.rates[way] = rate
        if len(self.rates) <= OTHERS_MIN or not training:
            return
        slow, before = rate * SLOW_TIMES < self.usual(way), self.slow.get(way, 0)
        self.slow[way] = before + 1 if slow else 0
        if before and not slow:
            # What was waited for this one says nothing about those that are left.
            self.slow_since = None
            self._since.clear()
        if any(self.slow.values()):
            self.slow_since = at if self.slow_since is None else self.slow_since
            self._unsure, self._round = (deque(), deque(maxlen=SAMPLES)), set()
            return
        self._round.add(way)
        if self._round >= self.rates.keys():
            last, present = self._unsure
            self._well.extend(last)
            self._unsure, self._round = (present, deque(maxlen=SAMPLES)), set()

    def usual(self, way: Way) -> float:
        """Return how fast all ways but one are, their median."""
        return median(rate for other, rate in self.rates.items() if other != way)

    def take(self, waited_s: float) -> None:
        """Take in for how long nobody computed in a step of now."""
        (self._unsure[1] if self.slow_since is None else self._since).append(waited_s)

    def waited(self) -> Waited | None:
        """Return what a step waited before a way became slow, and since; None if not known."""
        if min(len(self._well), len(self._since)) < KNOWN_MIN:
            return None
        before_s, now_s = median(self._well), median(self._since)
        noise_s = _MAD_TO_SIGMA * median(abs(each - before_s) for each in self._well)
        return Waited(before_s, now_s, now_s - before_s > NOISE * noise_s)

    def culprits(self) -> tuple[NodeId, ...]:
        """Return the node whose own network is slow: both of its ways, and none of others.

        Two, of which one is, if each is the other's buddy: the two ways are between the same two.
        """
        slow = [way for way, often in self.slow.items() if often >= NEIGHBOUR_IN_A_ROW]
        if len(slow) != len(("in", "out")) or max(self.slow[way] for way in slow) < IN_A_ROW:
            return ()
        return tuple(sorted(set(slow[0]) & set(slow[1])))

    def own(self, nodes: Sequence[NodeId]) -> bool:
        """Whether what a finding says of nodes is said of their own networks, not of a cable."""
        if len(nodes) == 1:
            return True
        first, second = nodes
        ways = ((first, second), (second, first))
        return min(self.slow.get(way, 0) for way in ways) >= NEIGHBOUR_IN_A_ROW
