"""Who sits where: the ranks of each node of a world."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import cast

from orchestrator.protocol.ids import NodeId, Rank


def ranks_by_node(seats: Sequence[NodeId]) -> dict[NodeId, tuple[Rank, ...]]:
    """Return the ranks that have their seat on each node: nodes in rank order, ranks ascending.

    Args:
        seats: node of each rank.
    """
    nodes = dict.fromkeys(seats)
    each = len(seats) // max(len(nodes), 1)
    if tuple(chain.from_iterable(repeat(node, each) for node in nodes)) == tuple(seats):
        # So it nearly always is; for thousands of nodes this is several times faster.
        firsts = range(0, len(seats), max(each, 1))
        return {
            node: cast("tuple[Rank, ...]", tuple(range(first, first + each)))
            for node, first in zip(nodes, firsts, strict=True)
        }
    ranks: dict[NodeId, list[Rank]] = {}
    for rank, node in enumerate(seats):
        ranks.setdefault(node, []).append(Rank(rank))
    return {node: tuple(own) for node, own in ranks.items()}
