"""What is made of silent corruption: nothing that came of it is trusted, nor who did it.

It did not raise an error, so the state looks as good as any. Nothing is diagnosed here: a node that
is under suspicion can be tested for hours once it is out of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

import msgspec

from orchestrator.core import devices
from orchestrator.core.incident import CORRUPTION
from orchestrator.core.records import Quarantined
from orchestrator.core.standing import Proof
from orchestrator.core.state import RunState
from orchestrator.core.trust import Onset
from orchestrator.protocol.ids import NodeId, Serial, Step
from orchestrator.protocol.messages import StateDiverged

GUARD_SHARE = 0.01
"""Of the nodes of a run, that is proven to have corrupted state in a day at most, but for one node:
of more, what proves it is as likely to be at fault, as where a fleet is of two kinds of processors
that round differently. Source: reference targets, no more than 1 % of a fleet leaves in a day on a
single evidence."""
GUARD_S = 86_400.0


def diverge(state: RunState, told: StateDiverged, proof: Proof) -> None:
    """Enter that state is not what it should be, once, however often it is told.

    Who is proven to have corrupted it is quarantined. Who is only suspected is a policy's affair.
    Of both the device ledger hears, unless it is their data that is wrong: no device made that.

    Args:
        state: of the run.
        told: what was found.
        proof: in which way, if it is proven.
    """
    fact = _with_nodes(state, told)
    if fact in state.divergences_told or fact.generation > state.generation:
        return
    told_before = list(state.divergences_told)
    state.divergences_told.append(fact)
    fact = _guarded(state, fact, told_before)
    now_wrong = fact.generation == state.generation or _continues(state, fact)
    good = fact.since or Step(0)
    onset = Onset(good, state.generation if now_wrong else fact.generation)
    state.onsets.append(onset)
    state.judge_commits()
    # What is being searched for is looked for by what was known before.
    state.found = state.asked_at = None
    if now_wrong:
        state.replays_vouch_for = min(state.replays_vouch_for, good)
        state.holdings.drop(step for step in state.holdings if step > good)
        for step in [step for step in state.losses if step > good]:
            del state.losses[step]
        # A step's digest is also of the state that it began with.
        for step in [step for step in state.digests if step > good]:
            del state.digests[step]
    ranks = fact.ranks if fact.generation == state.generation else ()
    # Another machine may have the name by now.
    named = [n for n in fact.nodes if not devices.came_later(state, n, fact.generation)]
    if fact.of_data:
        if fact.proven:
            enter(state, named, f"the data there is not that of other nodes: {fact.evidence}")
    elif fact.proven:
        found = devices.convict(state, named, ranks, proof, fact.evidence)
        enter(state, named, f"proven by replay or vote: {fact.evidence}", found)
    else:
        devices.suspect(state, named, ranks, fact.evidence)
    if now_wrong or any(node in state.seated and node in state.quarantined for node in fact.nodes):
        state.diverged.append(fact)
        state.suspects += [node for node in named if node not in state.suspects]


def enter(
    state: RunState,
    nodes: Iterable[NodeId],
    why: str,
    against: Mapping[NodeId, Serial] = MappingProxyType({}),
) -> None:
    """Quarantine nodes, until somebody says that they may be used again.

    Args:
        state: of the run.
        nodes: who.
        why: in words.
        against: by node, the device that it is held against, if that is known: then it is that
            device of which somebody may say so.
    """
    for node in nodes:
        entry = Quarantined(
            node=node, since=state.now, why=why, device=against.get(node, Serial(""))
        )
        state.quarantined.setdefault(node, entry)


def leave(state: RunState, nodes: Iterable[NodeId]) -> None:
    """Enter that nodes may be used again, and that what they were suspected of counts no more."""
    for node in nodes:
        state.quarantined.pop(node, None)
        for found in state.named.get(node, {}).values():
            for mark in [mark for mark in found if mark[0] == CORRUPTION]:
                del found[mark]
        if node in state.suspects:
            state.suspects.remove(node)


def _with_nodes(state: RunState, told: StateDiverged) -> StateDiverged:
    """Name the nodes of suspected ranks: later, others have their seats."""
    if told.nodes or told.generation != state.generation:
        return told
    seats = [state.seats[rank] for rank in told.ranks if 0 <= rank < len(state.seats)]
    return msgspec.structs.replace(told, nodes=tuple(dict.fromkeys(seats)))


def _guarded(
    state: RunState, fact: StateDiverged, before: Iterable[StateDiverged]
) -> StateDiverged:
    """Take what is proven of too many nodes, with those of the last day, for a suspicion only."""
    if not fact.proven:
        return fact
    lately = proven_lately(state, [each for each in before if each.of_data == fact.of_data])
    guilty = lately.union(fact.nodes)
    if lately.issuperset(fact.nodes) or not too_many(state, guilty):
        return fact
    words = (
        f"{fact.evidence}; so it is of {len(guilty)} nodes within a day, which rather speaks "
        "against what looks for it: it is not taken as proven"
    )
    return msgspec.structs.replace(fact, proven=False, evidence=words)


def proven_lately(state: RunState, told: Iterable[StateDiverged] | None = None) -> set[NodeId]:
    """Return the nodes that are out since less than a day, as proven to have corrupted state.

    Args:
        state: of the run.
        told: of what; None for all that was told.
    """
    told = state.divergences_told if told is None else told
    proven = {node for each in told if each.proven for node in each.nodes}
    return {
        node
        for node, known in state.quarantined.items()
        if node in proven and state.now - known.since < GUARD_S
    }


def too_many(state: RunState, nodes: Collection[NodeId]) -> bool:
    """Whether so many nodes can not all be at fault within a day."""
    return len(nodes) > max(1, int(len(state.nodes) * GUARD_SHARE))


def _continues(state: RunState, fact: StateDiverged) -> bool:
    """Whether the run has not gone back behind the onset since the generation that it is about."""
    back_to = [
        incident.restored_step
        for incident in state.incidents
        if incident.restarted_as is not None and incident.restarted_as > fact.generation
    ]
    return all(step is not None and step > (fact.since or 0) for step in back_to)
