"""What replays vouch for: states that devices made which computed right before and after.

In a step with a replay each rank's last micro-batch is computed once more by another rank, and the
step moves nothing unless all come out the same. So a device that computes wrongly always, or often,
was not there up to that step. What it does not show: a single wrong number in a micro-batch that
nobody computed again, and what a device made after its last replay that left before the next one.
"""

from __future__ import annotations

from orchestrator.core import saving, watching
from orchestrator.core.decisions import JudgeCheckpoint, RestoreFrom
from orchestrator.core.records import Committed
from orchestrator.core.state import RunState
from orchestrator.core.trust import Verdict, trusted
from orchestrator.protocol.ids import Step

REPLAYS = "replays"
"""What ranks call that detector when it is switched off."""


def enter(state: RunState, step: Step) -> None:
    """Enter that every rank's last micro-batch of a step came out the same elsewhere; 0: none."""
    if step > state.replayed and not state.diverged:
        state.replayed = step
        state.rounds += 1
        # The state that the step began with; what it made of it, the next one shows.
        state.replays_vouch_for = max(state.replays_vouch_for, Step(step - 1))


def continue_from(state: RunState, restore: RestoreFrom | None) -> None:
    """Enter from what a new generation continues, in which there was no replay yet."""
    state.replayed, state.rounds = Step(0), 0
    if restore is None:
        state.replays_vouch_for = Step(0)
    elif not restore.commit:
        state.replays_vouch_for = min(state.replays_vouch_for, restore.step)
    else:
        # It may be of another lineage than the one that replays were of.
        known = any(c.key == restore.commit and is_graded(state, c) for c in state.commits)
        state.replays_vouch_for = restore.step if known else Step(0)


def grade(state: RunState) -> list[JudgeCheckpoint]:
    """Have it put on record which checkpoints of this generation replays vouch for by now."""
    decisions: list[JudgeCheckpoint] = []
    for known in reversed(state.commits) if state.replayed else ():
        if known.epoch != state.generation or is_graded(state, known):
            break  # what came before was looked at then
        if known.step >= state.replayed or not _good(state, known):
            continue
        words = (
            f"each of {len(state.seats)} ranks had its last micro-batch of step {state.replayed} "
            f"come out the same on another rank; so in {state.rounds} "
            f"step{'s' * (state.rounds > 1)} of generation {state.generation}, otherwise in none"
        )
        decisions.append(saving.judge(state, known, Verdict.COMPUTE_VERIFIED, words))
    return decisions


def is_graded(state: RunState, known: Committed) -> bool:
    """Whether a checkpoint is compute verified, or that is about to be on record."""
    ordered = (known.step, known.epoch, Verdict.COMPUTE_VERIFIED) in state.judging
    return ordered or Verdict.COMPUTE_VERIFIED in known.verdicts


def newest(state: RunState) -> Step | None:
    """Return the step of the newest checkpoint that is graded so, and nothing is wrong with."""
    steps = (c.step for c in state.commits if is_graded(state, c) and _good(state, c))
    return max(steps, default=None)


def asked(state: RunState) -> bool:
    """Whether a state is to be gone back to that replays vouch for, before any newer one.

    So it is once state was wrong: who made it so may have computed wrongly, too, since it was last
    replayed. Where there are no replays any more, nothing new would ever be good enough.
    """
    if not state.diverged or REPLAYS in state.detectors_off:
        return False
    # A program may have them by itself.
    said = watching.replays(state.run, state.replicas).startswith("on")
    return said or state.replays_vouch_for > 0


def _good(state: RunState, known: Committed) -> bool:
    return not known.rejected and trusted(state.onsets, known.step, known.epoch)
