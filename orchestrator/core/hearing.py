"""When each node was heard last: of thousands of nodes, asked for at every tick."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.protocol.ids import NodeId, Seconds


class Hearing:
    """Of all nodes that ever joined.

    Args:
        limit_s: a node that has not been heard for longer is silent.

    Attributes:
        heard_at: when each was heard last, or when somebody looked again: silence counts from here.
        spoke_at: when each was heard last.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.heard_at: dict[NodeId, Seconds] = {}
        self.spoke_at: dict[NodeId, Seconds] = {}
        self._quiet: set[NodeId] = set()
        self._floor = Seconds(0.0)
        """No other node than those in `_quiet` was heard last before this moment."""

    def hear(self, nodes: Iterable[NodeId], now: Seconds) -> None:
        """Enter that nodes were heard just now."""
        heard = dict.fromkeys(nodes, now)
        self.heard_at.update(heard)
        self.spoke_at.update(heard)
        self._quiet.difference_update(heard)

    def forgive(self, now: Seconds) -> None:
        """Count silence from now on: until then nobody was looking."""
        self.heard_at = dict.fromkeys(self.heard_at, now)
        self._quiet, self._floor = set(), now

    def silent(self, now: Seconds) -> frozenset[NodeId]:
        """Return the nodes that are silent."""
        if now - self._floor > self._limit_s:
            limit_at = now - self._limit_s
            self._quiet = {node for node, at in self.heard_at.items() if at < limit_at}
            others = (at for node, at in self.heard_at.items() if node not in self._quiet)
            self._floor = min(others, default=now)
        return frozenset(self._quiet)
