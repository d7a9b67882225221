"""Which copies in memory a generation can start from, and which turned out to be of no use.

One bad copy says nothing about the others of its step. So what is struck off is as little as the
failure tells: a copy, a way from one node to another, a node that has no room. A step is given up
when no whole set of copies is left, or when it fails in a way that was known and not avoided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.core.state import RunState
from orchestrator.protocol.ids import NodeId, Rank, Step
from orchestrator.protocol.messages import FailedCopy, Holding, Joined, PreparationFailed

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
            state.holdings.get(fact.step, {}).get(copy.rank, set()).discard(copy.node)


def hold(state: RunState, node: NodeId, holdings: Iterable[Holding]) -> None:
    """Enter what a node holds, as far as it counts."""
    bad = {(s, copy.rank) for s, _, copy in state.struck if _is_gone_from(node, copy)}
    for holding in holdings:
        useless = holding.step < state.retained or holding.step in state.condemned_memory
        if not useless and (holding.step, holding.rank) not in bad:
            ranks = state.holdings.setdefault(holding.step, {})
            ranks.setdefault(holding.rank, set()).add(node)


def hold_only(state: RunState, node: NodeId, holdings: tuple[Holding, ...]) -> None:
    """Enter that a node holds this and no more: what it comes to hold later is another copy."""
    named = {(holding.step, holding.rank) for holding in holdings}
    for mark in tuple(state.struck):
        step, _, copy = mark
        if _is_gone_from(node, copy) and (step, copy.rank) not in named:
            del state.struck[mark]
    forget(state, node)
    hold(state, node, holdings)


def hold_verified(state: RunState, node: NodeId, step: Step) -> None:
    """Enter that a node has verified copies of a step for all of its ranks, just now."""
    ranks = state.ranks_of(node)
    for mark in tuple(state.struck):
        found, taker, copy = mark
        if found == step and (taker == node or (copy.node == node and copy.rank in ranks)):
            del state.struck[mark]
    hold(state, node, (Holding(rank, step) for rank in ranks))


def forget(state: RunState, node: NodeId) -> None:
    """Forget all that a node holds."""
    for ranks in state.holdings.values():
        for holders in ranks.values():
            holders.discard(node)


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


def strained(state: RunState) -> frozenset[NodeId]:
    """Return nodes that had no way to a copy, or no room for one: another may do better."""
    return frozenset(
        node
        for step, node, copy in state.struck
        if copy.kind not in _GONE and step >= state.retained
    )


def sources(state: RunState, seats: Sequence[NodeId], step: Step) -> tuple[NodeId, ...] | None:
    """Return per rank whose copy of a step it can start from; None if there is not one for each.

    Its own node's if that has one, else that of the first node that does.
    """
    found: list[NodeId] = []
    cramped = {n for s, n, copy in state.struck if s == step and copy.kind == "no-room"}
    cut_off = {(n, c.node) for s, n, c in state.struck if s == step and c.kind == "unreachable"}
    for rank, seat in enumerate(seats):
        holders = state.holders(step, Rank(rank))
        if seat in holders:
            found.append(seat)
            continue
        reachable = [holder for holder in holders if (seat, holder) not in cut_off]
        if seat in cramped or not reachable:
            return None
        found.append(reachable[0])
    return tuple(found)


def newest_safe_step(state: RunState) -> Step | None:
    """Return the newest step that memory can restore after the loss of any one node.

    With a single node in the cluster there is nowhere else to keep a copy, and its own is enough.
    A node that may be back at once is part of the cluster: after a controller died, all are.
    """
    patience_s = state.timeouts.silence_s
    cluster = [
        node
        for node in state.nodes.values()
        if node.usable or not (node.lost or node.unusable or state.now - node.heard_at > patience_s)
    ]
    wanted = 2 if len(cluster) > 1 else 1
    for step in sorted(state.holdings, reverse=True):
        ranks = state.holdings[step]
        if len(ranks) == state.run.world_size and all(
            len(state.holders(step, Rank(rank))) >= wanted for rank in ranks
        ):
            return step
    return None
