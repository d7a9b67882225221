"""What is made of a rank whose state went bad, and was given what its twins hold before it counted.

Or of one that updated wrongly and saw it itself, since it did so a second time (`source` is its own
rank, then). Nothing is lost but that step, so nothing is ended for it. Its device did it, or its
memory: that stands in the device ledger as a suspicion, and of a device that was under suspicion
already, or on probation, as a conviction: by vote, or by what it saw itself. Then its node gives up
its seats when that costs least.
"""

from __future__ import annotations

from orchestrator.core import copies, devices
from orchestrator.core.incident import COPIED, RECOMPUTED, REDONE, Note
from orchestrator.core.quarantine import GUARD_S, proven_lately, too_many
from orchestrator.core.records import Repair
from orchestrator.core.standing import Proof, Standing
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import NodeId, Step
from orchestrator.protocol.messages import StateRepaired

AGAIN = (Standing.SUSPECT, Standing.PROBATION)
"""A device that stands so, and is caught again, is convicted."""


def take(state: RunState, fact: StateRepaired) -> None:
    """Enter what ranks of this generation repaired, or did not; of two that tell, the first."""
    known = [*state.repairs, *([state.unrepaired] if state.unrepaired is not None else [])]
    if fact.begun:
        if not any(_of_one(each.fact, fact) for each in known):
            _begin(state, fact)
        return
    if any(_same(each.fact, fact) for each in known):
        return
    if fact.ranks != (fact.source,):
        state.repairing = None
    if fact.problem:
        state.unrepaired = Repair(state.now, NodeId(""), fact)
        return
    ranks = tuple(rank for rank in fact.ranks if 0 <= rank < len(state.seats))
    if len(ranks) != 1:
        return  # of whom, nobody can say: no more than digests, which are compared elsewhere
    node = state.seats[ranks[0]]
    if not by_itself(fact):
        # What is durable of it is compared with what other replicas staged (core.plausible).
        copies.distrust(state, Step(fact.step - 1), ranks[0])
    repair = Repair(state.now, node, fact)
    again = devices.stands(state, node, ranks, AGAIN)
    state.repairs.append(repair)
    lately = {r.node for r in state.repairs if state.now - r.at < GUARD_S}
    if again and not too_many(state, lately | proven_lately(state)):
        proof = Proof.SELF_CHECK if by_itself(fact) else Proof.VOTE
        devices.convict(state, (node,), ranks, proof, f"again, {words(fact)}")
    else:
        devices.suspect(state, (node,), ranks, words(fact))


def by_itself(fact: StateRepaired) -> bool:
    """Whether a rank saw that it had updated wrongly, and put that right, without any other."""
    return fact.ranks == (fact.source,)


def _begin(state: RunState, fact: StateRepaired) -> None:
    """Enter that a rank is about to be given what others hold: what it has is known to be wrong."""
    ranks = [rank for rank in fact.ranks if 0 <= rank < len(state.seats)]
    if len(ranks) == 1 and state.repairing is None:
        state.repairing = Repair(state.now, state.seats[ranks[0]], fact)
        copies.distrust(state, Step(fact.step - 1), ranks[0])


def break_off(state: RunState) -> Note | None:
    """Say what a repair has come to that was under way when something broke; None if none was.

    The rank's state was wrong, whether it has the right one by now or not: that is held against its
    device, which nobody else would tell of any more.
    """
    left, state.repairing = state.repairing, None
    if left is None:
        return None
    fact = left.fact
    told = f"{words(fact)}; it was being given that of rank {fact.source}, and nobody told the end"
    devices.suspect(state, (left.node,), fact.ranks, told)
    return Note(at=left.at, text=told)


def words(fact: StateRepaired) -> str:
    """Return what happened, in words."""
    who = f"rank {fact.ranks[0]}" if fact.ranks else "a rank"
    more = fact.count - len(fact.tensors)
    what = ", ".join(fact.tensors) + f" and {more} more" * (more > 0)
    if by_itself(fact):
        what = what or "some weights, of which a third time shows that the first was right"
        return (
            f"in step {fact.step}, {who} came to other bits when it updated a second time: {what}"
        )
    when = f"before step {fact.step} moved anything"
    if not fact.count:
        return (
            f"{when}, {who} had other digests of its state or gradient than most, and all hold the "
            "same state"
        )
    return f"{when}, {who} did not hold what most do of {what}"


def remedy(fact: StateRepaired) -> str:
    """Return what was done about it, in words."""
    if fact.begun:
        return f"it is about to be given that of rank {fact.source}"
    if by_itself(fact):
        return "it was computed a third time, and what came out twice is kept; the run goes on"
    given = "nothing had to be copied"
    if fact.count:
        tensors = f"{fact.count} tensor{'s' * (fact.count > 1)}"
        given = f"it was given {tensors} of rank {fact.source}, and digests of all are the same"
    return f"{given}; the step was begun anew, and nothing that counts has used what was wrong"


def rung(fact: StateRepaired) -> str:
    """Return which rung of the ladder that was."""
    if by_itself(fact):
        return RECOMPUTED
    return COPIED if fact.count else REDONE


def why_not(state: RunState, step: Step) -> str:
    """Say why state that showed to be wrong after a step was not repaired; "" if nobody did."""
    known = state.unrepaired
    if known is None or (known.fact.generation, known.fact.step) != (state.generation, step + 1):
        return ""
    return f"; not repaired: {known.fact.problem}"


def _of_one(told: StateRepaired, begun: StateRepaired) -> bool:
    """Whether it is told already what became of a repair that was begun."""
    return not by_itself(told) and (told.generation, told.step) == (begun.generation, begun.step)


def _same(one: StateRepaired, other: StateRepaired) -> bool:
    """Whether two tell the same: of several ranks, each may have updated wrongly in one step."""
    if one.problem or other.problem:
        return (one.generation, one.step) == (other.generation, other.step)
    marks = [(each.generation, each.step, each.ranks, each.source) for each in (one, other)]
    return marks[0] == marks[1]
