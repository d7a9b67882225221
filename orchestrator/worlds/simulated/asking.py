"""What nodes answer that are asked about their ranks: where they stand, and how fast they are."""

from __future__ import annotations

from orchestrator.core.decisions import InspectRanks, ProbeRanks
from orchestrator.protocol.messages import RankProbed, StacksTaken
from orchestrator.protocol.rank import Speed
from orchestrator.protocol.stacks import Stack
from orchestrator.worlds.simulated.cluster import Cluster
from orchestrator.worlds.simulated.team import Team

ANSWERING_MAX = 64
"""Nodes that say where their ranks stand. Nothing is decided by it, and a month has many hangs."""
LOADING, WAITING = ("next_batch (loader)",), ("all_reduce (collective)",)
"""Where ranks stand that hang, and those that wait for them."""
OPERATIONS, COPIED = 4e14, 2e12
"""Per second, of a device that is as fast as it should be."""


def where_they_stand(cluster: Cluster, team: Team | None, order: InspectRanks) -> None:
    """Have nodes say it: suspects stand in a loader, the others in a collective."""
    for name in order.nodes[:ANSWERING_MAX]:
        node = cluster.nodes[name]
        ranks = team.ranks.get(name, ()) if team is not None else ()
        if node.generation != order.generation or not ranks:
            continue
        apart = tuple(rank for rank in ranks if rank in order.suspects)
        waiting = tuple(rank for rank in ranks if rank not in order.suspects)
        found = ((apart, LOADING), (waiting, WAITING))
        stacks = tuple(Stack(of, frames) for of, frames in found if of)
        cluster.say([node], StacksTaken(generation=order.generation, stacks=stacks))


def how_fast_they_are(cluster: Cluster, order: ProbeRanks) -> None:
    """Have nodes say it; that all ranks stand still meanwhile is not simulated."""
    for rank, name in zip(order.ranks, order.nodes, strict=True):
        node = cluster.nodes[name]
        speed = Speed(OPERATIONS / node.slow, COPIED / node.slow)
        fact = RankProbed(generation=order.generation, number=order.number, rank=rank, speed=speed)
        cluster.say([node], fact)
