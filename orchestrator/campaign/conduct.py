"""Conducts trials in a live world: back to a snapshot, let a fault loose, take steps, listen.

One trajectory would say of a hundred trials what is so of one pair of states. So every so many
trials are of a run with other weights and another order of samples, and a world of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import msgspec

from orchestrator.campaign import harm
from orchestrator.campaign.baselines import Seen
from orchestrator.campaign.catalogue import HORIZON, MOMENTS, Group, Trial
from orchestrator.campaign.job import reseeded
from orchestrator.campaign.judging import Result, Watched, is_early, judged, onset
from orchestrator.campaign.world import LiveWorld, WorldBrokenError
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.trials import Drift, Gap, Return, Said, Step, Train

SNAPSHOTS = (10, 150)
"""Steps of the states that are struck: within the warm-up, and with the baselines' windows full."""
AT_ONCE = 4
"""Steps between two looks at what was found."""
RULES_STEPS = 4
"""That are taken after the first wrong one in any case, for the baselines to see something."""


class NotDeterministicError(Exception):
    """The twin of a trial differs from itself, so that nothing can be compared with it."""

    hint = "steps have to come out the same; see trainer.device and trainer.compile"


class Conductor:
    """Trials of one run file, but for its seed; a world that breaks is made anew.

    Use it as a context.

    Args:
        run: the run file.
        folder: of what is needed on the way.
        known: what came of trials before, whose twins have been counted.
        unwatched: whether to follow each fault unwatched as well, to see if it does harm.

    Attributes:
        alarms: what the detectors said of twins, which are steps without a fault.
        clean_steps: how many of those they looked at, each counted once.
        false_triggers: how many of them were computed once more for their numbers.
    """

    def __init__(
        self,
        run: TrainingRun,
        folder: Path,
        known: Iterable[Result] = (),
        *,
        unwatched: bool = False,
    ) -> None:
        self._run, self._folder = run, folder
        self._counted = _twins_of(known)
        self._worlds = 0
        self._trainer_seed = run.spec.trainer.seed
        self._world: LiveWorld | None = None
        self._open = contextlib.ExitStack()
        self._history: list[Seen] = []
        self._twins: dict[int, list[Seen]] = {}
        self._unwatched = unwatched
        self._clean: dict[int, Gap] = {}
        self.alarms: list[str] = []
        self.clean_steps = self.false_triggers = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def conduct(self, trial: Trial) -> Result:
        """Try one fault; what comes of it in a world that breaks under it counts as well.

        Raises:
            WorldBrokenError: if the world breaks without a fault in it.
            NotDeterministicError: if steps do not come out the same when they are taken again.
        """
        self._go_to(trial)
        self._there()
        before = self.before(trial.snapshot)
        twin = self._twin(trial.snapshot, _reach(trial.group))
        watched = Watched()
        try:
            self._conduct(trial, before, twin, watched)
        except WorldBrokenError as error:
            self._close()
            watched.crash = str(error)
        result = judged(trial, before=before, twin=twin, watched=watched)
        return self._with_harm(trial, result) if self._unwatched and result.effective else result

    def before(self, snapshot: int) -> Sequence[Seen]:
        """Return the steps that led to a snapshot."""
        return self._history[: SNAPSHOTS[snapshot]]

    def _conduct(
        self, trial: Trial, before: Sequence[Seen], twin: Sequence[Seen], watched: Watched
    ) -> None:
        """Let a fault loose, and take steps for as long as that is of interest."""
        how = trial.injection
        assert how is not None
        world = self._there()
        said = world.order(
            Return(snapshot=trial.snapshot, generation=world.next_generation(), injection=how)
        )
        watched.refused = [each.refused for each in said]
        steps = watched.steps
        while not any(watched.refused) and (more := self._more(trial, before, twin, watched)):
            said = world.order(Step(steps=more))
            steps += (came := _seen(said))
            heard = world.listen(float(len(steps)))
            watched.found += heard.found
            watched.thrown += heard.thrown if sum(each.struck for each in said) else []
            if len(came) < more:
                break  # a step that never comes out the same: a run would go back now

    def _more(
        self, trial: Trial, before: Sequence[Seen], twin: Sequence[Seen], watched: Watched
    ) -> int:
        """Return how many more steps a trial takes now, 0 if it is over."""
        how, taken = trial.injection, len(watched.steps)
        assert how is not None
        clean = how.step - 1
        if all(is_early(how, before, fact) for fact in watched.found):
            return max(min(clean + max(trial.horizon, RULES_STEPS) - taken, AT_ONCE), 0)
        began = onset(twin, watched.steps)
        if began is not None:
            clean = began - SNAPSHOTS[trial.snapshot] - 1
        last = how.step - 1 + max(trial.horizon, RULES_STEPS)
        return max(min(clean + RULES_STEPS, last) - taken, 0)

    def _with_harm(self, trial: Trial, result: Result) -> Result:
        """Return a result with what the fault would have come to if nobody had looked.

        A fault that did not strike in these steps, and bytes of a checkpoint that nobody goes on
        from, are not looked at.
        """
        clean = self._clean_gap(trial.snapshot)
        world = self._there()
        how, generation = trial.injection, world.next_generation()
        back = Return(snapshot=trial.snapshot, generation=generation, injection=how)
        try:
            if any(said.refused for said in world.order(back)):
                return result
            said = world.order(Drift(steps=harm.STEPS))
        except WorldBrokenError:
            # Whatever it is that ranks raised, they would have raised it in a run.
            self._close()
            return msgspec.structs.replace(result, harmful=True)
        if not any(each.struck for each in said):
            return result
        return harm.told(result, [each.gap for each in said], clean)

    def _clean_gap(self, snapshot: int) -> Gap:
        """Return the largest gap between any two of some clean runs after a snapshot."""
        world = self._there()
        if snapshot not in self._clean:
            gaps: list[Gap | None] = []
            for places in range(harm.CLEAN_RUNS):
                world.order(Return(snapshot=snapshot, generation=world.next_generation()))
                said = world.order(Drift(steps=harm.STEPS, places=places))
                gaps += [each.gap for each in said]
            self._clean[snapshot] = harm.widest(gaps)
        return self._clean[snapshot]

    def _go_to(self, trial: Trial) -> None:
        """Have a world of the trajectory that a trial strikes."""
        if trial.trainer_seed is None or trial.trainer_seed == self._trainer_seed:
            return
        self._close()
        self._trainer_seed = trial.trainer_seed
        self._history, self._twins = [], {}

    def _there(self) -> LiveWorld:
        """Return the world, which is made and brought to its snapshots if it is not there."""
        if self._world is None:
            self._worlds += 1
            cache = self._folder / "tokens"
            cache.mkdir(parents=True, exist_ok=True)
            run = reseeded(self._run, self._trainer_seed)
            world = LiveWorld(run, self._folder / f"world-{self._worlds}", cache)
            self._world = self._open.enter_context(world)
            done, history = 0, []
            for number, step in enumerate(SNAPSHOTS):
                history += _seen(world.order(Train(steps=step - done, snapshot=number)))
                done = step
            if self._history and history != self._history:
                raise NotDeterministicError("a world that was made anew took other steps")
            self._history = history
        return self._world

    def _twin(self, snapshot: int, count: int) -> Sequence[Seen]:
        """Return steps after a snapshot without a fault, at least so many."""
        known = self._twins.get(snapshot, [])
        if len(known) >= count:
            return known
        world = self._there()
        world.order(Return(snapshot=snapshot, generation=world.next_generation()))
        counted = self._counted.get((self._trainer_seed, snapshot), 0)
        last = SNAPSHOTS[snapshot] + counted
        steps: list[Seen] = []
        while len(steps) < count:
            said = world.order(Step(steps=min(AT_ONCE, count - len(steps))))
            steps += _seen(said)
            self.false_triggers += sum(step > last for step in said[0].looked_again)
            found = world.listen(float(len(steps))).found
            self.alarms += [fact.evidence for fact in found if fact.step >= last]
        self.clean_steps += max(count - counted, 0)
        self._counted[self._trainer_seed, snapshot] = max(count, counted)
        if steps[: len(known)] != known:
            raise NotDeterministicError(f"steps after {SNAPSHOTS[snapshot]} came out otherwise")
        self._twins[snapshot] = steps
        return steps

    def _close(self) -> None:
        self._world = None
        # Its ranks knew what clean runs come to.
        self._clean = {}
        self._open.close()


def _reach(group: Group) -> int:
    """Return for how many steps the twin of a trial is needed."""
    return MOMENTS + HORIZON[group]


def _twins_of(known: Iterable[Result]) -> dict[tuple[int, int], int]:
    """Return of each trajectory and snapshot how many steps without a fault were counted."""
    counted: dict[tuple[int, int], int] = {}
    for result in known:
        if result.trainer_seed is not None:
            of = result.trainer_seed, result.snapshot
            counted[of] = max(counted.get(of, 0), _reach(result.group))
    return counted


def _seen(said: Sequence[Said]) -> list[Seen]:
    """Return steps with the rows of all ranks, from what each rank said."""
    return [Seen(rows) for rows in zip(*(each.rows for each in said), strict=True)]
