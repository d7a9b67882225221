"""Brings what a generation continues from to a node: from itself, from others, or the store."""

from __future__ import annotations

from functools import lru_cache
from itertools import compress
from operator import ne
from typing import Literal, NamedTuple

from orchestrator.protocol.ids import NodeId, Rank, Step
from orchestrator.protocol.messages import Begin, FailedCopy, PreparationFailed
from orchestrator.worlds.simulated.cluster import Cluster
from orchestrator.worlds.simulated.node import Save, SimNode


class Tiers(NamedTuple):
    """How many shards of a node came from where."""

    own: int = 0
    fetched: int = 0
    durable: int = 0


class _Missing(NamedTuple):
    kind: Literal["absent", "unreachable"]
    words: str


def apart(order: Begin) -> frozenset[NodeId]:
    """Return the nodes some of whose shards are not as they staged them themselves: mostly few."""
    if not order.sources or (order.sources == order.seats and not order.staged_as):
        return frozenset()
    elsewhere = frozenset(compress(order.seats, map(ne, order.seats, order.sources)))
    if not order.staged_as:
        return elsewhere
    return elsewhere.union(compress(order.seats, map(ne, order.ranks, order.staged_as)))


def _staged_as(order: Begin) -> tuple[Rank, ...]:
    return order.staged_as or order.ranks


def tier_of(order: Begin, node: SimNode) -> str:
    """Return the slowest tier that a node has to wait for: own, fetched, durable or shared.

    What another node reads from the durable tier is shared: it comes once it was read there.
    """
    sources = {order.sources[rank] for rank in node.ranks} if order.sources else {node.id}
    if order.commit:
        return "durable" if sources <= {"", node.id} else "shared"
    return "own" if sources == {node.id} else "fetched"


def bring(
    cluster: Cluster, order: Begin, node: SimNode, origins: dict[Rank, Save], *, apart: bool
) -> Tiers | PreparationFailed:
    """Put the shards of a node's ranks into its memory.

    Args:
        cluster: the machines.
        order: says what from where.
        node: where to.
        origins: what each rank gets is entered here.
        apart: whether some of it is not to come from the node itself.
    """
    step = order.restore
    if step is None:
        return Tiers()
    if not apart and (own := _own(node, step)):
        origins.update(dict.fromkeys(node.ranks, own))
        return _all_own(len(node.ranks))
    counts = {"own": 0, "fetched": 0, "durable": 0}
    for rank in node.ranks:
        source = order.sources[rank]
        found = _fetch(cluster, order, node, rank, step)
        if isinstance(found, _Missing):
            staged_as = _staged_as(order)[rank]
            copies = (FailedCopy(node=NodeId(source), rank=staged_as, kind=found.kind),)
            return PreparationFailed(
                generation=order.generation,
                step=step,
                tier="durable" if order.commit else "memory",
                reason=f"rank {rank}: {found.words}",
                copies=() if order.commit else copies,
            )
        counts[_counted_as(cluster, order, node, rank)] += 1
        origins[rank] = found
        if not (cluster.forgetful or order.cut_anew):
            node.put(found, (rank,))
    return Tiers(**counts)


def _counted_as(cluster: Cluster, order: Begin, node: SimNode, rank: Rank) -> str:
    """Return from which tier a node says that it has a shard."""
    source = order.sources[rank]
    if order.commit and source:
        return "fetched" if _answers(cluster, node, NodeId(source)) else "durable"
    return "own" if source == node.id else "fetched" if source else "durable"


def _answers(cluster: Cluster, node: SimNode, source: NodeId) -> bool:
    there = cluster.nodes[source]
    return there is node or (there.alive and there.reachable and node.reachable)


def _own(node: SimNode, step: Step) -> Save | None:
    """Return a save that has all shards of a node."""
    for save, held in node.shelf.items():
        if save.step == step and held.issuperset(node.ranks):
            return save
    return None


@lru_cache(maxsize=1)
def _all_own(count: int) -> Tiers:
    """Return one and the same for thousands of nodes."""
    return Tiers(own=count)


def _fetch(
    cluster: Cluster, order: Begin, node: SimNode, rank: Rank, step: Step
) -> Save | _Missing:
    source = order.sources[rank]
    if order.commit:  # whoever read it: who can not have it from there reads it, too
        stored = cluster.store.find(order.commit)
        if stored is None:
            return _Missing("absent", f"{order.commit} can not be read")
        return Save(stored.step, stored.epoch)
    if not _answers(cluster, node, NodeId(source)):
        return _Missing("unreachable", f"{source} does not answer")
    found = cluster.nodes[NodeId(source)].find(_staged_as(order)[rank], step)
    return found or _Missing("absent", f"{source} has no shard of step {step}")
