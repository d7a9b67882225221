"""Steps without a fault, and with all that happens to a run besides: who speaks up is wrong.

A run that begins anew in the same way takes the same steps again, to the bit, and says nothing that
it has not said before. So all of them are of runs with other weights and samples than before.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Self

import numpy as np

from orchestrator.campaign.job import reseeded
from orchestrator.campaign.world import LiveWorld
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.trials import Quiet, Return, Train

RUN_STEPS = 1_000
"""Of one run, which begins anew after half of them, as after a restart."""
RELOAD_EVERY, LOOK_EVERY, GARBAGE_EVERY = 53, 29, 47
"""How often state goes through bytes of a checkpoint, a loss is evaluated, and samples are no
text."""


class Calm:
    """Runs without a fault, one after the other, of one run file but for its seed.

    Use it as a context.

    Args:
        run: the run file.
        folder: of what is needed on the way.
        seed: of everything that chance decides.
        taken: steps that were taken before: their runs are not taken once more.

    Attributes:
        alarms: what the detectors said of steps without a fault.
        clean_steps: how many of those they looked at.
        false_triggers: how many of those with a text were computed once more for their numbers.
    """

    def __init__(self, run: TrainingRun, folder: Path, seed: int, taken: int = 0) -> None:
        self._run, self._folder, self._seed = run, folder, seed
        self._before, self._taken, self._restarted = taken, 0, False
        self._world: LiveWorld | None = None
        self._open = contextlib.ExitStack()
        self.alarms: list[str] = []
        self.clean_steps = self.false_triggers = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def rest(self, count: int) -> None:
        """Take so many steps.

        Raises:
            WorldBrokenError: if the world breaks.
        """
        world = self._there()
        order = Quiet(
            steps=count,
            reload_every=RELOAD_EVERY,
            look_every=LOOK_EVERY,
            garbage_every=GARBAGE_EVERY,
        )
        said = world.order(order)
        self.false_triggers += sum(bool(step % GARBAGE_EVERY) for step in said[0].looked_again)
        self._taken += count
        self.alarms += [fact.evidence for fact in world.listen(float(self._taken)).found]
        self.clean_steps += count

    def _there(self) -> LiveWorld:
        """Return the world of the present run: of another one if that is over."""
        if self._world is None or self._taken >= RUN_STEPS:
            self._open.close()
            self._before += self._taken
            self._taken, self._restarted = 0, False
            cache = self._folder / "tokens"
            cache.mkdir(parents=True, exist_ok=True)
            own = reseeded(self._run, _drawn(self._seed, self._before))
            world = LiveWorld(own, self._folder / f"world-{self._before}", cache)
            self._world = self._open.enter_context(world)
            self._begin(self._world)
        elif self._taken >= RUN_STEPS // 2 and not self._restarted:
            self._begin(self._world)
            self._restarted = True
        return self._world

    def _begin(self, world: LiveWorld) -> None:
        """Go on from the present state, as a restart does."""
        world.order(Train(steps=0, snapshot=0))
        world.order(Return(snapshot=0, generation=world.next_generation()))


def _drawn(seed: int, before: int) -> int:
    """Return the `trainer.seed` of a run, by what was taken before it."""
    return int(np.random.Generator(np.random.Philox(key=[seed, before])).integers(1 << 31))
