"""Where agents can be called, and which of those that are to call them have been told.

An agent listens on another port each time it starts, and a controller that took over knows nobody's
until they join. Whoever began a generation without an address waits for it, so it is sent later.
"""

from __future__ import annotations

from collections.abc import Container

from orchestrator.core.decisions import StartGeneration
from orchestrator.protocol.ids import NodeId


class Addresses:
    """The addresses of one run's agents."""

    def __init__(self) -> None:
        self._at: dict[NodeId, str] = {}
        self._calls: dict[NodeId, set[NodeId]] = {}
        self._callers: dict[NodeId, set[NodeId]] = {}
        self._told: dict[NodeId, dict[NodeId, str]] = {}

    def begin(self, decision: StartGeneration) -> None:
        """Take in whom each node calls in a generation: its buddy, and where its state is from."""
        self._told = {}
        self._calls = {node: set() for node in decision.seats}
        for node, buddy in decision.buddies.items():
            self._calls.setdefault(node, set()).add(buddy)
        if decision.restore is not None:
            for node, source in zip(decision.seats, decision.restore.sources, strict=True):
                self._calls[node].add(NodeId(source))
        self._callers = {}
        for node, called in self._calls.items():
            called -= {node, NodeId("")}
            for other in called:
                self._callers.setdefault(other, set()).add(node)

    def joined(self, node: NodeId, address: str) -> None:
        """Take note of where a node is now; what it was told before may not have arrived."""
        self._at[node] = address
        self._told.pop(node, None)

    def told(self, node: NodeId) -> bool:
        """Return whether a node was told to begin, on the connection that it has."""
        return node in self._told

    def waiting(self, node: NodeId) -> list[NodeId]:
        """Return who has begun the present generation, calls `node`, and has another address."""
        at = self._at[node]
        return [
            caller
            for caller in sorted(self._callers.get(node, ()))
            if caller in self._told and self._told[caller].get(node) != at
        ]

    def news(self, node: NodeId, linked: Container[NodeId]) -> dict[NodeId, str] | None:
        """Return the addresses to tell a node that begins; None if it has all that it needs.

        Args:
            node: with a seat in the present generation.
            linked: nodes that are connected now. The others are left out, but never taken back.
        """
        known = self._told.get(node)
        called = sorted(self._calls[node])
        news = {peer: self._at[peer] for peer in called if peer in linked and peer in self._at}
        if known is not None and news.items() <= known.items():
            return None
        self._told[node] = told = (known or {}) | news
        return told
