"""Which copies in memory a generation can start from, and which turned out to be of no use.

One bad copy says nothing about the others of its step. So what is struck off is as little as the
failure tells: a copy, a way from one node to another, a node that has no room. A step is given up
when no whole set of copies is left, or when it fails in a way that was known and not avoided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.core.events import CopiesHeld
from orchestrator.core.state import RunState
from orchestrator.core.trust import trusted
from orchestrator.protocol.ids import NodeId, Rank, Step
from orchestrator.protocol.messages import FailedCopy, Holding, Joined, PreparationFailed
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


def hold(state: RunState, node: NodeId, holdings: Iterable[Holding]) -> None:
    """Enter what a node holds, as far as it counts."""
    bad = {(s, copy.rank) for s, _, copy in state.struck if _is_gone_from(node, copy)}
    ranks: dict[Step, set[Rank]] = {}
    for holding in holdings:
        if counts(state, holding.step) and (holding.step, holding.rank) not in bad:
            ranks.setdefault(holding.step, set()).add(holding.rank)
    for step, held in ranks.items():
        state.holdings.add(step, node, frozenset(held))


def hold_together(state: RunState, held: CopiesHeld) -> None:
    """Enter that the world holds a step, but for what is missing."""
    if not counts(state, held.step):
        return
    state.holdings.spread(held.step, state.copied if held.copied else state.staged)
    state.holdings.discard_all(held.step, held.missing)
    for node in held.uncopied if held.copied and state.holdings.of(held.step) else ():
        state.holdings.discard(held.step, state.buddies[node], state.staged.of(node))
    for step, _, copy in state.struck:
        if step == held.step and copy.kind in _GONE:
            state.holdings.discard(step, copy.node, frozenset((copy.rank,)))


def counts(state: RunState, step: Step) -> bool:
    """Whether copies of a step are worth knowing of."""
    known_bad = step in state.condemned_memory
    # What is in memory was made by the present generation, or by those that it continues.
    return (
        step >= state.retained and not known_bad and trusted(state.onsets, step, state.generation)
    )


def hold_only(state: RunState, node: NodeId, holdings: tuple[Holding, ...]) -> None:
    """Enter that a node holds this and no more: what it comes to hold later is another copy."""
    named = {(holding.step, holding.rank) for holding in holdings}
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
        for mark in tuple(state.struck):
            found, taker, copy = mark
            if found == step and (taker == node or (copy.node == node and copy.rank in ranks)):
                del state.struck[mark]
        # Nearly always its own memory had them, and it was only read.
        if counting and not known.of(node).issuperset(ranks):
            state.holdings.add(step, node, frozenset(ranks))
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


def strained(state: RunState) -> frozenset[NodeId]:
    """Return nodes that had no way to a copy, or no room for one: another may do better."""
    return frozenset(
        node
        for step, node, copy in state.struck
        if copy.kind not in _GONE and step >= state.retained
    )


def sources(state: RunState, seats: Sequence[NodeId], step: Step) -> tuple[NodeId, ...] | None:
    """Return per rank whose copy of a step it can start from; None if there is not one for each.

    Its own node's if that has one, else that of the first node that does. What was staged on a node
    before it became unusable is as good as it was, and its agent serves it while it is there.
    """
    copies = state.holdings.of(step)
    mute = [node for node in state.unfit if not state.nodes[node].serves]
    if copies.least(mute) == 0:
        return None
    found = list(seats)
    cramped = {n for s, n, copy in state.struck if s == step and copy.kind == "no-room"}
    cut_off = {(n, c.node) for s, n, c in state.struck if s == step and c.kind == "unreachable"}
    for seat, own in ranks_by_node(seats).items():
        held = frozenset() if seat in state.unfit else copies.of(seat)
        if held.issuperset(own):
            continue
        reachable = [
            node
            for node in copies.holding_any(frozenset(own))
            if state.nodes[node].serves and (seat, node) not in cut_off
        ]
        for rank in own:
            if rank in held:
                continue
            holder = next((node for node in reachable if rank in copies.of(node)), None)
            if seat in cramped or holder is None:
                return None
            found[rank] = holder
    return tuple(found)


def newest_safe_step(state: RunState) -> Step | None:
    """Return the newest step, of those not retained yet, that survives the loss of any one node.

    With a single node in the cluster there is nowhere else to keep a copy, and its own is enough.
    """
    newer = sorted((step for step in state.holdings if step > state.retained), reverse=True)
    # Asked for at every event: nearly always, nothing new is held by everybody.
    if not any(state.holdings.of(step).least() for step in newer):
        return None
    wanted = _copies_wanted(state)
    for step in newer:
        if state.holdings.of(step).least(state.unfit) >= wanted:
            return step
    return None


def _copies_wanted(state: RunState) -> int:
    """Return how many copies make a shard safe: two, unless the cluster has one node.

    A node that may be back at once is part of the cluster: after a controller died, all are. One
    that was drained or quarantined is not.
    """
    silent, members, kept_out = state.hearing.silent(state.now), 0, state.cordoned()
    for node in state.nodes.values():
        gone = node.lost or node.unusable or node.id in silent
        members += (node.usable or not gone) and node.id not in kept_out
        if members > 1:
            return 2
    return 1
