"""Which copies in memory a generation can start from, and which turned out to be of no use.

One bad copy says nothing about the others of its step. So what is struck off is as little as the
failure tells: a copy, a way from one node to another, a node that has no room. A step is given up
when no whole set of copies is left, or when it fails in a way that was known and not avoided.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from orchestrator.core.events import CopiesHeld
from orchestrator.core.holdings import Copies, Share
from orchestrator.core.state import RunState
from orchestrator.core.trust import trusted
from orchestrator.protocol.ids import NodeId, Rank, Step
from orchestrator.protocol.messages import FailedCopy, Holding, Joined, PreparationFailed, Prepared
from orchestrator.protocol.seats import ranks_by_node

_GONE = ("corrupt", "absent")


def strike(state: RunState, node: NodeId, fact: PreparationFailed) -> None:
    """Strike off what a node could not start from."""
    generation = fact.generation
    marks = [(fact.step, node, copy) for copy in fact.copies]
    # Agents say it again when they reconnect: in the same generation it is no second time.
    if all(state.struck.get(mark, generation) != generation for mark in marks):
        state.condemned_memory.add(fact.step)
    for mark in marks:
        state.struck.setdefault(mark, generation)
    for copy in fact.copies:
        if copy.kind in _GONE:
            state.holdings.discard(fact.step, copy.node, frozenset((copy.rank,)))


def strike_late(state: RunState, node: NodeId, fact: PreparationFailed) -> None:
    """Strike off what a node has not got, as it says of a generation that is over already.

    The first that can not start ends a generation. If what the others say of it were left out, a
    state that is gone everywhere would be found out one node and one restart at a time.
    """
    if fact.generation > state.generation or fact.step > state.start_step:
        return  # what is beyond is staged anew: it may have that by now
    # As of now: the present generation was ordered when nobody knew, and may fail of it as well.
    for copy in fact.copies:
        if _is_gone_from(node, copy):
            state.struck.setdefault((fact.step, node, copy), state.generation)
            state.holdings.discard(fact.step, node, frozenset((copy.rank,)))


def find_bad(state: RunState, fact: Prepared) -> None:
    """Strike off what a node found other nodes to have no good copy of, when it mended its own."""
    for bad in fact.lacking:
        if fact.generation != state.generation and bad.step > state.start_step:
            continue  # what is beyond is staged anew
        # Agents say it again when they reconnect: also when the copy has been replaced since.
        known = state.bad_copies.setdefault((bad.step, bad.node, bad.rank), bad.what)
        if known:
            state.holdings.discard(bad.step, bad.node, frozenset((bad.rank,)))


def distrust(state: RunState, step: Step, rank: Rank) -> None:
    """Count on no copy of what a rank staged after a step: it was wrong before it was staged.

    Its checksums are right, so no node that has it finds anything, and it may be under way to one
    that holds nothing of it yet. It is so of whoever holds it, for as long as the step is not
    computed anew: its twins staged the right one.
    """
    state.distrusted.setdefault(step, set()).add(rank)
    _strike_distrusted(state, step)


def _strike_distrusted(state: RunState, step: Step) -> None:
    for rank in sorted(state.distrusted.get(step, ())):
        for node in state.holdings.of(step).holders(rank):
            state.holdings.discard(step, node, frozenset((rank,)))


def twins_of_distrusted(state: RunState, step: Step) -> dict[Rank, Rank]:
    """Return as whose each shard is to be had, of which what the rank itself staged is wrong."""
    bad = state.distrusted.get(step, set())
    return {
        rank: next((twin for twin in _twins(state, rank) if twin not in bad), rank)
        for rank in sorted(bad)
    }


def hold(state: RunState, node: NodeId, holdings: Iterable[Holding]) -> None:
    """Enter what a node holds, as far as it counts."""
    bad = {(s, copy.rank) for s, _, copy in state.struck if _is_gone_from(node, copy)}
    bad |= {(s, rank) for (s, n, rank), what in state.bad_copies.items() if n == node and what}
    bad |= {(s, rank) for s, wrong in state.distrusted.items() for rank in wrong}
    ranks: dict[Step, set[Rank]] = {}
    for holding in holdings:
        if (holding.step, holding.rank) not in bad:
            ranks.setdefault(holding.step, set()).add(holding.rank)
    for step, held in ranks.items():
        if counts(state, step):
            state.holdings.add(step, node, frozenset(held))


def hold_together(state: RunState, held: CopiesHeld) -> None:
    """Enter that the world holds a step, but for what is missing."""
    if not counts(state, held.step):
        return
    # What was copied was staged before.
    there = state.copied if held.copied else state.staged
    state.holdings.spread(held.step, there, over=state.staged)
    state.holdings.discard_all(held.step, held.missing)
    for node in held.uncopied if held.copied and state.holdings.of(held.step) else ():
        state.holdings.discard(held.step, state.buddies[node], state.staged.of(node))
    for step, _, copy in state.struck:
        if step == held.step and copy.kind in _GONE:
            state.holdings.discard(step, copy.node, frozenset((copy.rank,)))
    for (step, holder, rank), what in state.bad_copies.items():
        if step == held.step and what:
            state.holdings.discard(step, holder, frozenset((rank,)))
    _strike_distrusted(state, held.step)


def counts(state: RunState, step: Step) -> bool:
    """Whether copies of a step are worth knowing of."""
    known_bad = step in state.condemned_memory
    # What is in memory was made by the present generation, or by those that it continues.
    return (
        step >= state.retained and not known_bad and trusted(state.onsets, step, state.generation)
    )


def hold_only(
    state: RunState,
    node: NodeId,
    holdings: tuple[Holding, ...],
    renewed: tuple[Holding, ...] = (),
) -> None:
    """Enter that a node holds this and no more: what it comes to hold later is another copy.

    So is what was renewed: it came in place of what was held before.
    """
    if state.bad_copies:
        as_found = {(h.step, h.rank) for h in holdings} - {(h.step, h.rank) for h in renewed}
        for step, holder, rank in state.bad_copies:
            if holder == node and (step, rank) not in as_found:
                state.bad_copies[step, holder, rank] = ""
    named = {(h.step, h.rank) for h in holdings} if state.struck else frozenset()
    for mark in tuple(state.struck):
        step, _, copy = mark
        if _is_gone_from(node, copy) and (step, copy.rank) not in named:
            del state.struck[mark]
    forget(state, node)
    hold(state, node, holdings)


def hold_verified(state: RunState, nodes: Iterable[NodeId], step: Step) -> None:
    """Enter that nodes have verified copies of a step for all of their ranks, just now."""
    known, counting = state.holdings.of(step), counts(state, step)
    for node in nodes:
        ranks = state.ranks_of(node)
        for mark in tuple(state.struck) if state.struck else ():
            found, taker, copy = mark
            if found == step and (taker == node or (copy.node == node and copy.rank in ranks)):
                del state.struck[mark]
        for key in state.bad_copies:
            if key[:2] == (step, node) and key[2] in ranks:
                state.bad_copies[key] = ""
        # Nearly always its own memory had them, and it was only read: thousands of nodes say so.
        if counting and not known.of(node).issuperset(ranks):
            sound = frozenset(ranks) - state.distrusted.get(step, set())
            state.holdings.add(step, node, sound)
            known = state.holdings.of(step)


def forget(state: RunState, node: NodeId) -> None:
    """Forget all that a node holds."""
    state.holdings.forget(node)


def of_this_lineage(state: RunState, joined: Joined) -> tuple[Holding, ...]:
    """Return what a node holds that still counts, if it comes back from an older generation."""
    since = [step for g, step in state.kept.items() if g > joined.generation]
    return tuple(h for h in joined.holdings if all(h.step <= step for step in since))


def _is_gone_from(node: NodeId, copy: FailedCopy) -> bool:
    return copy.node == node and copy.kind in _GONE


def forget_beyond(state: RunState, kept: Step) -> None:
    """Forget what was wrong with steps that are computed anew, or not needed any more."""
    # What is beyond is staged anew: their copies will not be those that were unreadable.
    state.condemned_memory = {step for step in state.condemned_memory if step <= kept}
    state.struck = {m: g for m, g in state.struck.items() if state.retained <= m[0] <= kept}
    state.bad_copies = {k: w for k, w in state.bad_copies.items() if state.retained <= k[0] <= kept}
    wrong = state.distrusted
    state.distrusted = {s: ranks for s, ranks in wrong.items() if state.retained <= s <= kept}


def strained(state: RunState) -> frozenset[NodeId]:
    """Return nodes that had no way to a copy, or no room for one: another may do better."""
    return frozenset(
        node
        for step, node, copy in state.struck
        if copy.kind not in _GONE and step >= state.retained
    )


class Found(NamedTuple):
    """Where the shards of a world can be had."""

    nodes: tuple[NodeId, ...]
    """Per rank: whose memory has it."""
    staged_as: tuple[Rank, ...]
    """Per rank: as whose it was staged; none if each has its own."""


def sources(state: RunState, seats: Sequence[NodeId], step: Step) -> Found | None:
    """Return per rank whose copy of a step it can start from; None if there is not one for each.

    Its own node's if that has one, else one that another replica staged, if its node has that: the
    same bits; else that of the first node that has one, else any other replica's. What was staged
    on a node before it became unusable is as good as it was, and its agent serves it while it is
    there.
    """
    copies = state.holdings.of(step)
    mute = [node for node in state.unfit if not state.nodes[node].serves]
    if copies.least(mute) == 0 and not _each_shard(state, copies, mute):
        return None
    nodes, twins = list(seats), {}
    cramped = {n for s, n, copy in state.struck if s == step and copy.kind == "no-room"}
    cut_off = {(n, c.node) for s, n, c in state.struck if s == step and c.kind == "unreachable"}
    # Memory that has spoilt one copy may have spoilt others.
    spoilt = {c.node for s, _, c in state.struck if s == step and c.kind == "corrupt"}
    spoilt |= {node for (s, node, _), what in state.bad_copies.items() if s == step and what}
    lacking: list[tuple[NodeId, Rank, Share]] = []
    for seat, own in ranks_by_node(seats).items():
        held = frozenset() if seat in state.unfit else copies.of(seat)
        if not held.issuperset(own):
            here = frozenset() if seat in spoilt else held
            lacking += [(seat, rank, here) for rank in own if rank not in held]
    there = _serving(state, copies, [rank for _, rank, _ in lacking])
    for seat, rank, here in lacking:
        found = _copy_of(state, rank, seat, here, there, cut_off)
        if found is None or seat in cramped:
            return None
        nodes[rank], twin = found
        if twin != rank:
            twins[rank] = twin
    every = map(Rank, range(len(seats)))
    return Found(tuple(nodes), tuple(twins.get(rank, rank) for rank in every) if twins else ())


def _each_shard(state: RunState, copies: Copies, mute: Sequence[NodeId]) -> bool:
    """Whether there is a copy of each shard, whichever replica staged it."""
    shard_R, held_R = state.run.layout.shards(), copies.count_R(mute) > 0
    return bool(np.bincount(shard_R, held_R, state.shard_count()).all())


def _serving(state: RunState, copies: Copies, ranks: Sequence[Rank]) -> dict[Rank, list[NodeId]]:
    """Return who can serve the shards of some ranks, whichever replica staged them; sorted."""
    wanted = frozenset(twin for rank in ranks for twin in _twins(state, rank))
    there = copies.holders_of(wanted) if wanted else {}
    return {
        rank: [node for node in nodes if state.nodes[node].serves] for rank, nodes in there.items()
    }


def _twins(state: RunState, rank: Rank) -> list[Rank]:
    """Return the ranks of all replicas that have the same shard, its own included."""
    layout = state.run.layout
    shard = layout.shard_of(rank)
    return [Rank(layout.rank_of(shard, replica)) for replica in range(layout.dp_replicate)]


def _copy_of(
    state: RunState,
    rank: Rank,
    seat: NodeId,
    held: Share,
    there: dict[Rank, list[NodeId]],
    cut_off: Container[tuple[NodeId, NodeId]],
) -> tuple[NodeId, Rank] | None:
    """Return from whom a seat can have a shard that it lacks, and as whose that was staged."""
    layout, twins = state.run.layout, _twins(state, rank)
    if (here := next((twin for twin in twins if twin in held), None)) is not None:
        return seat, here
    reach = {
        twin: [node for node in there.get(twin, ()) if (seat, node) not in cut_off]
        for twin in twins
    }
    if reach[rank]:
        return reach[rank][0], rank
    others = [(node, twin) for twin in twins for node in reach[twin]]
    # Several replicas that lack all do not ask one and the same node.
    return others[layout.replica_of(rank) % len(others)] if others else None


def newest_safe_step(state: RunState) -> Step | None:
    """Return the newest step, of those not retained yet, that survives the loss of any one node.

    With a single node in the cluster there is nowhere else to keep a copy, and its own is enough.
    """
    newer = sorted((step for step in state.holdings if step > state.retained), reverse=True)
    # Asked for at every event: nearly always, nothing new is held by everybody.
    # None of all ranks, while the world has fewer.
    first = len(state.seats) if state.short else None
    if not any(state.holdings.of(step).whole(first) for step in newer):
        return None
    wanted = _copies_wanted(state)
    for step in newer:
        if state.holdings.of(step).least(state.unfit, first=first) >= wanted:
            return step
    return None


def _copies_wanted(state: RunState) -> int:
    """Return how many copies make a shard safe: two, unless the cluster has one node.

    A node that may be back at once is part of the cluster: after a controller died, all are. One
    that was drained or quarantined is not. A world of one node that began without another has
    nobody to copy to, whoever has come since.
    """
    if not state.buddies:
        return 1
    kept_out = state.cordoned()
    usable = (node for node in state.nodes.values() if node.usable and node.id not in kept_out)
    if sum(1 for _ in islice(usable, 2)) > 1:
        return 2
    silent, members = state.hearing.silent(state.now), 0
    for node in state.nodes.values():
        gone = node.lost or node.unusable or node.id in silent
        members += (node.usable or not gone) and node.id not in kept_out
    return 2 if members > 1 else 1
