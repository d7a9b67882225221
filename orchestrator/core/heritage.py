"""What one life of a run leaves to the next: the losses that led to where that one goes on.

A life has a journal, a clock and a ledger of its own. The result is that of the whole lineage,
whoever computed it, so the first events of a later life tell what the one before it knew; from
then on its own journal is enough. They also tell what was committed, so that a durable tier which
has lost it is not taken for one that never had any.
"""

from __future__ import annotations

from orchestrator.core import devices
from orchestrator.core.decisions import RestoreFrom
from orchestrator.core.events import CommitLeft, Inherited
from orchestrator.core.records import Committed, Quarantined
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Seconds, Step

LOSSES_MAX = 100_000
"""Of one event: a few megabytes of journal."""


def left_by(former: RunState, at: Seconds) -> list[Inherited]:
    """Return what a life that is over leaves, as events of the next one, in order.

    All losses that it knew: where its end was does not say where the next one will go on.
    """
    losses = sorted(former.losses.items())
    commits = tuple(
        CommitLeft(c.step, c.epoch, c.key, tuple(sorted(v for v in c.verdicts if v.good)))
        for c in former.commits
    )
    starts = range(0, max(len(losses), 1), LOSSES_MAX)
    return [
        Inherited(
            at=at,
            generation=max(former.generation, former.former_generation),
            losses=tuple(losses[start : start + LOSSES_MAX]),
            untold_step=former.untold_step,
            divergences=tuple(sorted(set(former.divergences))),
            digests_differ=tuple(sorted(set(former.digests_differ))),
            commits=commits,
            onsets=tuple(former.onsets),
            # Of others the device ledger says so, and when that is over.
            quarantined=tuple(
                (node, q.why) for node, q in sorted(former.quarantined.items()) if not q.device
            ),
            devices=devices.left_by(former),
            judging=tuple(former.judging_devices.values()),
        )
        for start in starts
    ]


def inherit(state: RunState, left: Inherited) -> None:
    """Take over what a former life left. Told twice, it changes nothing the second time."""
    state.former_generation = left.generation
    state.untold_step = left.untold_step
    state.losses.update(left.losses)
    state.divergences = list(left.divergences)
    state.digests_differ = list(left.digests_differ)
    state.onsets = list(left.onsets)
    state.quarantined = {
        node: Quarantined(node=node, since=state.now, why=why) for node, why in left.quarantined
    }
    devices.inherit(state, left)
    # Without what was found wrong with them: the durable tier is asked anew.
    state.commits, state.sound_commits = [], set()
    state.know_commits(
        Committed(c.step, c.epoch, c.key, state.now, verdicts=set(c.verdicts)) for c in left.commits
    )


def continue_from(state: RunState, restore: RestoreFrom | None) -> None:
    """Forget the losses that did not lead to the state from which a new generation continues.

    Within a life, those of steps that are done again stay, to be compared. What a former life
    computed beyond that state is no part of this one: its job may have been repaired since.
    """
    restored = restore.step if restore else Step(0)
    if restore is not None and _is_of_an_unknown_life(state, restore):
        state.losses, state.divergences, state.digests_differ = {}, [], []
        state.untold_step = restored
        return
    state.untold_step = min(state.untold_step, restored)
    if not state.kept:
        state.losses = {step: loss for step, loss in state.losses.items() if step <= restored}
        state.divergences = [step for step in state.divergences if step <= restored]
        state.digests_differ = [step for step in state.digests_differ if step <= restored]


def _is_of_an_unknown_life(state: RunState, restore: RestoreFrom) -> bool:
    """Whether what is restored was committed by a generation that no journal here tells of."""
    epochs = [commit.epoch for commit in state.commits if commit.key == restore.commit]
    return any(epoch > state.former_generation and epoch not in state.kept for epoch in epochs)
