"""Finds the way between two nodes on which copies of shards take far longer than on all others.

Each node tells how fast its shards reach its buddy (agent.links), so nodes stand in a ring, with
one way in and one way out. If both ways of a node are slow, it is that node's own network; if only
one of them is, it may be the cable between the two. Nothing is done about it: how much of a step
waits for the network nobody can say for one way alone. What is told is the most it can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from orchestrator.core.events import Event, Reported
from orchestrator.core.incident import SLOW_LINK, Cause, Finding
from orchestrator.core.phases import RunPhase
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Generation, NodeId
from orchestrator.protocol.messages import LinkTimed

SLOW_TIMES = 3.0
"""Times as long as on the usual way. Assumed: a port that came up at a quarter of its rate, or a
cable that sends everything again, is far above; a host that is busy with something is below."""
IN_A_ROW = 3
"""Medians of copies, one after the other, all of them slow."""
NEIGHBOUR_IN_A_ROW = 2
"""So often for the other way of a node: it is told about as often, a little earlier or later."""
OTHERS_MIN = 3
"""Ways to compare with."""
_Way = tuple[NodeId, NodeId]


class Links:
    """Each way is told of once in a generation."""

    name = "links"

    def __init__(self) -> None:
        self._generation = Generation(0)
        self._rates: dict[_Way, float] = {}
        self._slow: dict[_Way, int] = {}
        """How often in a row each way was slow."""
        self._told: set[_Way] = set()

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return a finding for a way that has been slow for long enough."""
        if not isinstance(event, Reported) or not isinstance(event.fact, LinkTimed):
            return []
        fact = event.fact
        if fact.generation != state.generation or event.node not in state.seated:
            return []
        # What no agent of ours says must neither fill the memory nor switch this detector off.
        if fact.to not in state.nodes or not fact.bytes_per_s > 0:
            return []
        if self._generation != state.generation:
            self._generation = state.generation
            self._rates, self._slow, self._told = {}, {}, set()
        way = (event.node, fact.to)
        self._rates[way] = fact.bytes_per_s
        others = [rate for other, rate in self._rates.items() if other != way]
        if len(others) < OTHERS_MIN or state.phase is not RunPhase.TRAINING:
            return []
        usual = median(others)
        slow = fact.bytes_per_s * SLOW_TIMES < usual
        self._slow[way] = self._slow.get(way, 0) + 1 if slow else 0
        if self._slow[way] < IN_A_ROW or way in self._told:
            return []
        return [self._finding(state, way, usual)]

    def _finding(self, state: RunState, way: _Way, usual: float) -> Finding:
        source, to = way
        into = next((each for each in self._rates if each[1] == source), way)
        out = next((each for each in self._rates if each[0] == to), way)
        culprits: tuple[NodeId, ...] = way
        why = "other ways of both are not slow: it is what lies between them"
        for node, other in ((source, into), (to, out)):
            if other != way and self._slow.get(other, 0) >= NEIGHBOUR_IN_A_ROW:
                culprits = (node,)
                why = f"so is the way from {other[0]} to {other[1]}: it is the network of {node}"
                self._told.add(other)
                break
        self._told.add(way)
        rate, most = self._rates[way], _not_computing(state)
        share = f"at most {100 * most:.0f} %" if most else "nobody knows yet how much"
        return Finding(
            at=state.now,
            since=state.now,
            kind=SLOW_LINK,
            cause=Cause.NETWORK,
            nodes=tuple(sorted(set(culprits))),
            step=state.reached_step,
            evidence=f"copies from {source} reach {to} with {rate / 1e6:.3g} MB/s, "
            f"{usual / rate:.1f} times as slowly as between other nodes ({usual / 1e6:.3g} MB/s, "
            f"median of {len(self._rates) - 1}), {IN_A_ROW} times in a row; {why}",
            detail=f"training goes on, nobody is swapped: {share} of a step waits for the network; "
            "have cable, port and switch looked at, and drain the node if that is much",
            measure=(usual / rate, most),
        )


def _not_computing(state: RunState) -> float:
    """Return the share of a step in which the slowest rank does not compute; 0 if not known."""
    step_s = state.step_times.quantile(0.5)
    if not state.paces.full or step_s <= 0:
        return 0.0
    slowest_s = float(state.paces.compute_s_WR()[-1].max())
    return max(1 - slowest_s / step_s, 0.0)
