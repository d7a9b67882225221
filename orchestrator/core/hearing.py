"""When each node was heard last: of thousands of nodes, asked for at every tick.

Nearly every tick hears the same nodes as the one before. They are kept as one chorus with one
moment; what is entered at a node itself is older, or newer, than that.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.protocol.ids import NodeId, Seconds

_NEVER = Seconds(float("-inf"))


class Hearing:
    """Of all nodes that ever joined.

    Args:
        limit_s: a node that has not been heard for longer is silent.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._heard_at: dict[NodeId, Seconds] = {}
        self._spoke_at: dict[NodeId, Seconds] = {}
        self._chorus: tuple[NodeId, ...] = ()
        self._voices: frozenset[NodeId] = frozenset()
        self._chorus_at = _NEVER
        self._others: set[NodeId] = set()
        """Those that are not in the chorus, and not silent as far as is known."""
        self._quiet: frozenset[NodeId] = frozenset()
        """Those that are not in the chorus, and were silent when that was asked last."""

    def heard_at(self, node: NodeId) -> Seconds:
        """Return when a node was heard last, or somebody looked again: silence counts from here."""
        own_at = self._heard_at[node]
        return max(own_at, self._chorus_at) if node in self._voices else own_at

    def spoke_at(self, node: NodeId) -> Seconds:
        """Return when a node was heard last."""
        own_at = self._spoke_at[node]
        return max(own_at, self._chorus_at) if node in self._voices else own_at

    def hear(self, node: NodeId, now: Seconds) -> None:
        """Enter that a node was heard just now."""
        if node not in self._voices:
            self._others.add(node)
            self._quiet -= {node}
        self._heard_at[node] = self._spoke_at[node] = now

    @property
    def chorus(self) -> tuple[NodeId, ...]:
        """The nodes that were heard together last."""
        return self._chorus

    def hear_many(self, nodes: Iterable[NodeId], now: Seconds) -> None:
        """Enter that each of these nodes was heard just now."""
        heard = dict.fromkeys(nodes, now)
        self._heard_at.update(heard)
        self._spoke_at.update(heard)
        if not heard.keys() <= self._voices:
            self._others |= heard.keys() - self._voices
            self._quiet -= heard.keys()

    def hear_all(self, nodes: tuple[NodeId, ...], now: Seconds) -> None:
        """Enter that these nodes, all of which were heard before, were heard just now."""
        if nodes != self._chorus:
            voices = frozenset(nodes)
            for node in self._voices - voices:
                self._heard_at[node], self._spoke_at[node] = (
                    self.heard_at(node),
                    self.spoke_at(node),
                )
            self._voices = voices
            self._others = {node for node in self._heard_at if node not in voices}
            self._quiet = frozenset()
        # Also if it is the same in other words: to be told again in these is seen at once.
        self._chorus, self._chorus_at = nodes, now

    def forgive(self, now: Seconds) -> None:
        """Count silence from now on: until then nobody was looking."""
        self._heard_at = dict.fromkeys(self._heard_at, now)
        self._others |= self._quiet
        self._quiet = frozenset()

    def silent(self, now: Seconds) -> frozenset[NodeId]:
        """Return the nodes that are silent."""
        limit_at = now - self._limit_s
        # Who is silent stays so until it is heard, maybe for days: only the others are looked at.
        quiet = [node for node in self._others if self._heard_at[node] < limit_at]
        if quiet:
            self._others.difference_update(quiet)
            self._quiet |= frozenset(quiet)
        if self._chorus_at >= limit_at:
            return self._quiet
        return self._quiet | {node for node in self._voices if self._heard_at[node] < limit_at}
