"""How to go on: which state to continue from, and on which rung of the ladder that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from textwrap import shorten

from orchestrator.core import vouching
from orchestrator.core.copies import sources
from orchestrator.core.decisions import RestoreFrom
from orchestrator.core.incident import CORRUPTION, GROWTH
from orchestrator.core.phases import RunPhase
from orchestrator.core.plans import End, Plan, Policy, Restart, Search
from orchestrator.core.state import RunState
from orchestrator.core.trust import trusted
from orchestrator.policy import devices, lemons, planned, recut, shrinking, suspicion, vouched
from orchestrator.policy.placement import Placement, buddies, place, wait_for_nodes
from orchestrator.policy.quarantine import stop_unlocated, take_out
from orchestrator.policy.reading import read_once
from orchestrator.policy.stopping import back_off, stop_budget, stop_misconfigured, stop_poison
from orchestrator.policy.switches import MEMORY_FIRST, enabled
from orchestrator.protocol.ids import NodeId, Rank, Step
from orchestrator.protocol.runfile import seconds

NAMED_MAX = 16
"""Of more nodes than this, a reason says how many they are."""
PASSED_OVER_MAX, PASSED_OVER_CHARACTERS = 3, 240
"""Of more checkpoints, each with its own fault, an end says how many they are; of each, so much."""


def restart(state: RunState) -> Plan | None:  # noqa: PLR0911 - one return per rung
    """Start a generation from the newest state there is: memory first, then the durable tier."""
    placement = place(state)
    if placement is None:
        return None
    memory = _from_memory(state, placement)
    step = memory.step if memory else None
    # Step 0 in memory is no more than the seed.
    if not step and (why := _nothing_of_ours(state)):
        return End(state="Failed", reason=why)
    best, commit = memory, max(state.sound_commits, default=Step(-1))
    vouched_for = _from_memory(state, placement, up_to=vouched.in_memory(state))
    graded = vouched.committed(state)
    if vouched_for is not None or graded is not None:
        best, commit = vouched_for, Step(-1) if graded is None else graded
    if best is not None and best.step >= commit:
        return _restart(state, placement, best)
    if state.search_failure:
        return _without_durable(state, placement, memory)
    if state.found is None:
        return _search(state, step, commit)
    found = state.found.step
    better = state.found.grade is not None and best is not vouched_for
    if found is not None and (best is None or found > best.step or better):
        if why := recut.refused(state):
            return End(state="Failed", reason=why)
        return _restart(state, placement, _from_durable(state, placement, found))
    return _restart(state, placement, best)


def _from_memory(
    state: RunState, placement: Placement, *, up_to: Step | None = None
) -> RestoreFrom | None:
    """Return the newest step in memory, unless a run does without; see `newest_in_memory`."""
    if not enabled(state, MEMORY_FIRST) and state.sound_commits:
        return None
    return newest_in_memory(state, placement, up_to=up_to)


def _from_durable(state: RunState, placement: Placement, found: Step) -> RestoreFrom:
    """Return how to go on from the checkpoint that was found."""
    assert state.found is not None
    anew = recut.needed(state)
    # Of another cut nobody has a shard that is another one's, too.
    reads = None if anew else read_once(state, placement.seats, found)
    return RestoreFrom(
        step=found,
        sources=reads.nodes if reads else ("",) * len(placement.seats),
        commit=state.found.key,
        staged_as=reads.staged_as if reads else (),
        cut_anew=anew,
    )


def _search(state: RunState, memory: Step | None, commit: Step) -> Search:
    """Ask the durable tier, if that may have more than memory has."""
    if not state.seats:
        return Search(reason="looking for a checkpoint of an earlier life of this run")
    graded = vouching.asked(state)
    kind = "checkpoint that is compute verified" if vouched.committed(state) else "commit"
    return Search(
        reason=f"memory has {_words(memory)}, the newest {kind} is step {commit}; "
        "searching the durable tier",
        graded=graded,
    )


def _without_durable(state: RunState, placement: Placement, memory: RestoreFrom | None) -> Plan:
    """Ask a silent durable tier again until `recovery.spareWait`, then take what memory has."""
    since = state.phase_since if state.phase is RunPhase.SEARCHING else state.now
    patience_s = seconds(state.run.spec.recovery.spare_wait)
    words = f"the durable tier does not answer: {state.search_failure}"
    again = state.search_again_at
    if again is not None and again - since <= patience_s:
        return Search(at=again, reason=f"{words}; asking again for up to {patience_s:g} s")
    if memory is not None:
        plan = _restart(state, placement, memory)
        return replace(plan, reason=f"{plan.reason}; {words}")
    return End(
        state="Failed",
        reason=f"the durable tier does not answer, and memory has {_words(None)}: "
        f"{state.search_failure}; nothing was deleted, run it again when the store is back",
    )


def _nothing_of_ours(state: RunState) -> str:
    """Say why a durable tier without a usable checkpoint is not one to begin anew in; "" if it is.

    Beginning anew would throw away what an operator may still save.
    """
    if state.found is None or state.found.step is not None:
        return ""
    if state.found.foreign:
        return (
            f"spec.checkpoint.uri has {state.found.foreign}, expected checkpoints of run "
            f"{state.run.metadata.name} or none\nhint: choose another folder"
        )
    if state.found.rejected and not _none_was_ever_good(state):
        return (
            f"spec.checkpoint.uri has checkpoints of this run, and none can be trusted: "
            f"{_passed_over(state.found.rejected)}\nhint: nothing was deleted; bring an older one "
            "back, or choose another folder to begin anew"
        )
    newest = max((known.step for known in state.commits), default=Step(0))
    if newest > 0 and not state.found.rejected:
        return (
            f"spec.checkpoint.uri has no checkpoint, and this run committed some, the newest of "
            f"step {newest}; is the volume mounted?\nhint: bring it back and run it again, or "
            "choose another metadata.name or --out to begin anew"
        )
    return ""


def _none_was_ever_good(state: RunState) -> bool:
    """Whether the seed is the newest state that is trusted, and ever was: nothing is lost with it.

    If the run once had a checkpoint from before the corruption, and has deleted it since, somebody
    may still have it; then it is not for a controller to begin a run of weeks anew.
    """
    if not state.from_seed or state.first_commit is None or not state.onsets:
        return False
    if any(trusted(state.onsets, known.step, known.epoch) for known in state.commits):
        return False
    return min(onset.step for onset in state.onsets) < state.first_commit


def _passed_over(rejected: Sequence[str]) -> str:
    """Say what is wrong with the newest checkpoints, once where it is the same.

    Args:
        rejected: "step S, epoch E: why", newest first.
    """
    told = []
    alike = [
        (why, [text.partition(": ")[0] for text in texts])
        for why, texts in groupby(rejected, key=lambda text: text.partition(": ")[2])
    ]
    for why, which in alike[:PASSED_OVER_MAX]:
        words = shorten(f"{which[0]}: {why}", PASSED_OVER_CHARACTERS, placeholder=" ...")
        if len(which) > 1:
            words += f" (the same of {len(which) - 1} older, down to {which[-1]})"
        told.append(words)
    left = sum(len(which) for _, which in alike[PASSED_OVER_MAX:])
    return "; ".join(told) + f"; and {left} more, older still" * bool(left)


def newest_in_memory(
    state: RunState, placement: Placement, *, up_to: Step | None = None
) -> RestoreFrom | None:
    """Return the newest step of which every seat can have its shard from some node's memory.

    Args:
        state: of the run.
        placement: who has which seat.
        up_to: this one at most, and none that is no more than the seed; None for any.
    """
    for step in sorted(state.holdings, reverse=True):
        if up_to is not None and not 0 < step <= up_to:
            continue
        if step not in state.condemned_memory and (found := sources(state, placement.seats, step)):
            return RestoreFrom(step=step, sources=found.nodes, staged_as=found.staged_as)
    return None


def _restart(state: RunState, placement: Placement, restore: RestoreFrom | None) -> Restart:
    rung = _rung(state, placement, restore)
    resized = shrinking.reason(state, placement.replicas)
    where = f"from step {restore.step}" if restore else "from the seed"
    swaps = "".join(
        f", {_named(state, new)} in place of {_named(state, old)}"
        for old, new in placement.replaced
    )
    incident = state.incident
    if incident is None:
        nodes = list(dict.fromkeys(placement.seats))
        named = ", ".join(nodes) if len(nodes) <= NAMED_MAX else f"{len(nodes)} nodes"
        reason = f"starting {where} on {named}"
        reason += f"; {resized}" * bool(resized)
        reason += "".join(f"; passed over {text}" for text in _rejections(state))
    else:
        lost = max(state.reached_step - (restore.step if restore else 0), 0)
        who = "" if incident.kind == GROWTH else f"{incident.suspects()}: "
        reason = (
            f"{who}{incident.findings[0].evidence}; {rung}{swaps}"
            f"{f' {where}' if restore else ''}, {lost} step{'' if lost == 1 else 's'} to do again"
        )
        reason += f"; {resized}" * bool(resized)
        if placement.evicted:
            reason += (
                f"; {', '.join(placement.evicted)} may be at fault, the second time within "
                f"{suspicion.AGAIN_S / 60:.0f} min, and may be well: put aside, not condemned"
            )
        reason += vouched.why(state, restore)
        if restore is None or restore.commit:
            reason += "".join(f"; passed over {text}" for text in _rejections(state))
    if restore is not None and restore.cut_anew:
        reason += f"; cut anew {restore.cut_anew}"
    return Restart(
        seats=placement.seats,
        dismiss=_dismissed(state),
        restore=restore,
        buddies=buddies(state, placement.seats),
        rung=rung,
        reason=reason,
        evicted=placement.evicted,
    )


def _named(state: RunState, node: NodeId) -> str:
    """Return a node, with why it is not to be relied on, if it is not."""
    if node in state.quarantined:
        return f"{node} (quarantined)"
    why = devices.standing(state, node)
    why = why or lemons.standing(state, node) or suspicion.standing(state, node)
    return f"{node} ({why})" if why else node


def _rung(  # noqa: PLR0911 - one return per rung
    state: RunState, placement: Placement, restore: RestoreFrom | None
) -> str:
    if state.incident is None:
        return "start"
    if restore is None:
        return "start over from the seed"
    if state.diverged:
        return "roll back before the onset"
    if restore.commit:
        return "resume from the durable tier"
    if placement.replicas != state.replicas:
        return "shrink" if placement.replicas < state.replicas else "grow back"
    if not placement.replaced:
        return "restart in place"
    if state.incident.kind == planned.KIND:
        return "planned swap"
    return "over-eviction" if placement.evicted else "swap for a spare"


def _dismissed(state: RunState) -> tuple[Rank, ...]:
    """Return the ranks whose process may not live on: suspects, or everybody if nobody stands out.

    A process that hung once is not asked to leave politely; it may not be able to.
    """
    incident = state.incident
    if incident is None or incident.generation != state.generation:
        return ()
    if any(f.kind in _NOBODY_NAMED and not f.ranks for f in incident.findings):
        return tuple(Rank(rank) for rank in range(len(state.seats)))
    return incident.ranks


_NOBODY_NAMED = ("hang", CORRUPTION)


def _rejections(state: RunState) -> tuple[str, ...]:
    return state.found.rejected if state.found else ()


def _words(step: Step | None) -> str:
    return "nothing whole" if step is None else f"step {step}"


def ladder() -> tuple[Policy, ...]:
    """Return the rules in the order in which they are asked."""
    return (
        stop_misconfigured,
        stop_poison,
        stop_budget,
        take_out,
        stop_unlocated,
        back_off,
        wait_for_nodes,
        restart,
    )
