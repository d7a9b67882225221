"""Which connection is which node's: a node has one, and a newer one replaces it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.messages import ToAgent, encode


class Link(Protocol):
    """A connection to an agent, as the server gives it. Calls return at once, from any thread."""

    def send(self, data: bytes) -> None:
        """Queue a message; one that the agent does not take in time closes the connection."""
        ...

    def close(self, reason: str) -> None:
        """Close the connection."""
        ...


class Links:
    """Those of one run's agents. In it, and iterated over in order, are the connected nodes."""

    def __init__(self) -> None:
        self._links: dict[NodeId, Link] = {}
        self._names: dict[Link, NodeId] = {}

    def __contains__(self, node: object) -> bool:
        return node in self._links

    def __iter__(self) -> Iterator[NodeId]:
        return iter(sorted(self._links))

    def join(self, node: NodeId, link: Link) -> None:
        """Take a connection for the node's, in place of an older one."""
        old = self._links.get(node)
        if old is not None and old is not link:
            old.close("the same node connected again")
            self._names.pop(old, None)
        self._links[node], self._names[link] = link, node

    def node_of(self, link: Link) -> NodeId | None:
        """Return whose connection it is; None if a newer one of the same node has replaced it."""
        node = self._names.get(link)
        return node if node is not None and self._links.get(node) is link else None

    def forget(self, link: Link) -> None:
        """Take note that a connection is closed."""
        node = self._names.pop(link, None)
        if node is not None and self._links.get(node) is link:
            del self._links[node]

    def hang_up(self, node: NodeId, reason: str) -> None:
        """Close a node's connection; what is on its way on it counts no more."""
        link = self._links.get(node)
        if link is not None:
            link.close(reason)
            self.forget(link)

    def send(self, node: NodeId, message: ToAgent) -> None:
        """Send a message to a node, if it is connected."""
        self.send_all((node,), message)

    def send_all(self, nodes: Iterable[NodeId], message: ToAgent) -> None:
        """Send the same message to nodes, as far as they are connected."""
        data = encode(message)
        for node in nodes:
            link = self._links.get(node)
            if link is not None:
                link.send(data)
