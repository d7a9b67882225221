"""How large the global batch of each step is: a function of the tokens that were trained on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from orchestrator.protocol import runfile
from trainer.shares import Place, share_of


class _Stage(NamedTuple):
    """Steps with batches of one size."""

    step: int
    """The first, 1-based."""
    sample: int
    """Its first, of the run."""
    batch: int


class Ramp:
    """Global batches that change their size at the first step after so many tokens.

    Args:
        batch: samples of the first step.
        length: tokens of a sample.
        changes: tokens trained on, and samples of a step from then on; ascending.
    """

    def __init__(self, batch: int, length: int, changes: Iterable[tuple[int, int]]) -> None:
        self._stages = [_Stage(1, 0, batch)]
        for tokens, then in changes:
            before = self._stages[-1]
            # Whole steps: the one that reaches the number of tokens is still of the old size.
            steps = max(-(-(tokens - before.sample * length) // (before.batch * length)), 0)
            self._stages.append(
                _Stage(before.step + steps, before.sample + steps * before.batch, then)
            )

    @classmethod
    def of(cls, job: runfile.Trainer) -> Ramp:
        """Return that of a run."""
        changes = [(change.tokens, change.global_batch) for change in job.batch_ramp]
        return cls(job.global_batch, job.seq_len, changes)

    def batch(self, step: int) -> int:
        """Return the samples of a step (1-based)."""
        return self._stage(step).batch

    def consumed(self, steps: int) -> int:
        """Return the samples of the first so many steps together.

        >>> [Ramp(2, 10, [(50, 4)]).consumed(steps) for steps in range(6)]
        [0, 2, 4, 6, 10, 14]
        """
        stage = self._stage(steps + 1)
        return stage.sample + (steps + 1 - stage.step) * stage.batch

    def _stage(self, step: int) -> _Stage:
        return self._stages[bisect_right(self._stages, step, key=lambda stage: stage.step) - 1]


def job_at(job: runfile.Trainer, step: int) -> runfile.Trainer:
    """Return a job with the global batch of this step."""
    return msgspec.structs.replace(job, global_batch=Ramp.of(job).batch(step))


def slices(job: runfile.Trainer, place: Place, steps: range) -> Iterator[tuple[int, range]]:
    """Yield the micro-batches of a rank over some steps, in order, as indices of global batches."""
    ramp = Ramp.of(job)
    batch, share = 0, []
    for step in steps:
        if ramp.batch(step) != batch:
            batch = ramp.batch(step)
            share = share_of(job_at(job, step), place).micro_batches
        for indices in share:
            yield step, indices
