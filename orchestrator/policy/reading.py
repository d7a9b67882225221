"""Who reads which shard from the durable tier: one rank for the whole job, and from it the others.

Replicas have the same shards. If each read its own, a bucket would give every byte as often as
there are replicas, and nodes wait for it that can send each other the same many times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.copies import Found, twins_of_distrusted
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import NodeId, Rank, Step

FANOUT = 4
"""How many nodes fetch a shard from each node that has it: of R replicas, the last one has it after
log4 R hops, and no node sends it more often than this."""


def read_once(state: RunState, seats: Sequence[NodeId], step: Step) -> Found:
    """Return per rank from where it gets its shard of a checkpoint: "" from the durable tier.

    A rank that is known to have its shard is told "" as well: its agent looks at home first.

    Args:
        state: of the run.
        seats: node of each rank.
        step: of the checkpoint.
    """
    shards, copies = state.shard_count(), state.holdings.of(step)
    bad = twins_of_distrusted(state, step)
    nodes, staged_as = [NodeId("")] * len(seats), [Rank(rank) for rank in range(len(seats))]
    for shard in range(shards):
        twins = [Rank(rank) for rank in range(shard, len(seats), shards)]
        # In turn, so that all nodes share in reading; and so that all of them share in sending.
        first = shard % len(twins)
        twins = twins[first:] + twins[:first]
        # What a rank staged of that step and its node still has need not be read, nor sent.
        has = {rank for rank in twins if rank in copies.of(seats[rank]) and rank not in bad}
        twins.sort(key=lambda rank: rank not in has)
        if sound := [rank for rank in twins if rank not in bad]:
            for rank, parent in _tree(seats, sound, [rank for rank in twins if rank in bad]):
                if rank not in has:
                    nodes[rank], staged_as[rank] = seats[parent], parent
    if not any(nodes):
        return Found(tuple(nodes), ())
    return Found(tuple(nodes), tuple(staged_as))


def _tree(
    seats: Sequence[NodeId], sound: Sequence[Rank], bad: Sequence[Rank]
) -> list[tuple[Rank, Rank]]:
    """Return who gets a shard from whom; the first one is the root and not among them.

    Args:
        seats: node of each rank.
        sound: ranks with that shard, of one node or of many.
        bad: others, of whom nobody may get it: what they hold themselves is wrong.
    """
    edges = []
    nodes: dict[NodeId, Rank] = {}
    """On each node, the rank that has it first, in the order in which nodes come to have it."""
    there: list[Rank] = []
    for rank in sound:
        here = nodes.setdefault(seats[rank], rank)
        if here != rank:
            edges.append((rank, here))
            continue
        if there:
            edges.append((rank, there[(len(there) - 1) // FANOUT]))
        there.append(rank)
    return edges + [(rank, sound[0]) for rank in bad]
