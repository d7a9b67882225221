"""Who sits where: the ranks of each node of a world."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

from orchestrator.protocol.ids import NodeId, Rank

_Blocks = tuple[tuple[Rank, ...], ...]


def ranks_by_node(seats: Sequence[NodeId]) -> dict[NodeId, tuple[Rank, ...]]:
    """Return the ranks that have their seat on each node: nodes in rank order, ranks ascending.

    Args:
        seats: node of each rank.
    """
    # A restart asks it of the same world from several sides, and each time it takes milliseconds.
    return dict(_ranks_by_node(tuple(seats)))


@lru_cache(maxsize=2)
def _ranks_by_node(seats: tuple[NodeId, ...]) -> dict[NodeId, tuple[Rank, ...]]:
    nodes = tuple(dict.fromkeys(seats))
    each = len(seats) // max(len(nodes), 1)
    if len(nodes) * each == len(seats) and all(seats[i::each] == nodes for i in range(each)):
        # So it nearly always is; for thousands of nodes this is several times faster.
        return dict(zip(nodes, _blocks(len(nodes), each), strict=True))
    ranks: dict[NodeId, list[Rank]] = {}
    for rank, node in enumerate(seats):
        ranks.setdefault(node, []).append(Rank(rank))
    return {node: tuple(own) for node, own in ranks.items()}


@lru_cache(maxsize=2)
def _blocks(nodes: int, each: int) -> _Blocks:
    """Return the ranks of each of so many nodes that have so many ranks, one after the other."""
    return cast("_Blocks", tuple(tuple(range(i * each, (i + 1) * each)) for i in range(nodes)))
