"""What is made of a rank whose state went bad, and was given what its twins hold before it counted.

Or of one that updated wrongly and saw it itself, since it did so a second time (`source` is its own
rank, then). Nothing is lost but that step, so nothing is ended for it. Its device did it, or its
memory: that stands in the device ledger as a suspicion, and of a device that was under suspicion
already, or on probation, as a conviction by vote. Then its node gives up its seats when that costs
least.
"""

from __future__ import annotations

from orchestrator.core import copies, devices
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
    if any(_same(each.fact, fact) for each in known):
        return
    if fact.problem:
        state.unrepaired = Repair(state.now, NodeId(""), fact)
        return
    ranks = tuple(rank for rank in fact.ranks if 0 <= rank < len(state.seats))
    if len(ranks) != 1:
        return  # of whom, nobody can say: no more than digests, which are compared elsewhere
    node = state.seats[ranks[0]]
    if ranks != (fact.source,):
        # What is durable of it is compared with what other replicas staged (core.plausible).
        copies.distrust(state, Step(fact.step - 1), ranks[0])
    repair = Repair(state.now, node, fact)
    again = devices.stands(state, node, ranks, AGAIN)
    state.repairs.append(repair)
    lately = {r.node for r in state.repairs if state.now - r.at < GUARD_S}
    if again and not too_many(state, lately | proven_lately(state)):
        devices.convict(state, (node,), ranks, Proof.VOTE, f"again, {words(fact)}")
    else:
        devices.suspect(state, (node,), ranks, words(fact))


def words(fact: StateRepaired) -> str:
    """Return what happened, in words."""
    who = f"rank {fact.ranks[0]}" if fact.ranks else "a rank"
    more = fact.count - len(fact.tensors)
    what = ", ".join(fact.tensors) + f" and {more} more" * (more > 0)
    if fact.ranks == (fact.source,):
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
    if fact.ranks == (fact.source,):
        return "it was computed a third time, and what came out twice is kept; the run goes on"
    given = "nothing had to be copied"
    if fact.count:
        tensors = f"{fact.count} tensor{'s' * (fact.count > 1)}"
        given = f"it was given {tensors} of rank {fact.source}, and digests of all are the same"
    return f"{given}; the step was begun anew, and nothing that counts has used what was wrong"


def why_not(state: RunState, step: Step) -> str:
    """Say why state that showed to be wrong after a step was not repaired; "" if nobody did."""
    known = state.unrepaired
    if known is None or (known.fact.generation, known.fact.step) != (state.generation, step + 1):
        return ""
    return f"; not repaired: {known.fact.problem}"


def _same(one: StateRepaired, other: StateRepaired) -> bool:
    """Whether two tell the same: of several ranks, each may have updated wrongly in one step."""
    if one.problem or other.problem:
        return (one.generation, one.step) == (other.generation, other.step)
    marks = [(each.generation, each.step, each.ranks, each.source) for each in (one, other)]
    return marks[0] == marks[1]
