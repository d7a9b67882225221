"""Finds the way between two nodes on which copies of shards take far longer than on all others.

If both ways of a node are slow, it is that node's own network, or in a world of an even number of
nodes that of its buddy, where both lead; if only one of them is, it may be the cable between the
two. Who has a slow network of its own may lose its seats for it, once it is
known what that costs (policy.networks); of a way alone nobody can say. What is told of that is the
most it can be.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.events import Event, Reported
from orchestrator.core.incident import SLOW_LINK, Cause, Finding
from orchestrator.core.phases import RunPhase
from orchestrator.core.state import RunState
from orchestrator.core.ways import IN_A_ROW, NEIGHBOUR_IN_A_ROW, Way
from orchestrator.protocol.ids import Generation, NodeId
from orchestrator.protocol.messages import LinkTimed

NOT_KNOWN = "is not known, since each is the other's buddy, until the next generation"


class Links:
    """Each way is told of once in a generation."""

    name = "links"

    def __init__(self) -> None:
        self._generation = Generation(0)
        self._told: set[Way] = set()

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return a finding for a way that has been slow for long enough."""
        if not isinstance(event, Reported) or not isinstance(event.fact, LinkTimed):
            return []
        fact, way = event.fact, (event.node, event.fact.to)
        if fact.generation != state.generation or state.phase is not RunPhase.TRAINING:
            return []
        if self._generation != state.generation:
            self._generation, self._told = state.generation, set()
        if state.ways.slow.get(way, 0) < IN_A_ROW or way in self._told:
            return []
        return [self._finding(state, way)]

    def _finding(self, state: RunState, way: Way) -> Finding:
        ways, (source, to) = state.ways, way
        into = next((each for each in ways.rates if each[1] == source), way)
        out = next((each for each in ways.rates if each[0] == to), way)
        culprits: tuple[NodeId, ...] = way
        why, then = "other ways of both are not slow: it is what lies between them", "nobody is"
        for node, other in ((source, into), (to, out)):
            if other != way and ways.slow.get(other, 0) >= NEIGHBOUR_IN_A_ROW:
                whose, then = f"the network of {node}", f"{node} is"
                if other == (to, source):
                    whose, then = f"the network of one of the two, which {NOT_KNOWN}", "both are"
                else:
                    culprits = (node,)
                why = f"so is the way from {other[0]} to {other[1]}: it is {whose}"
                then += " if what that costs is known, and pays"
                self._told.add(other)
                break
        self._told.add(way)
        rate, usual, most = ways.rates[way], ways.usual(way), _not_computing(state)
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
            f"median of {len(ways.rates) - 1}), {IN_A_ROW} times in a row; {why}",
            detail=f"training goes on; swapped {then}: {share} of a step waits for the network; "
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
