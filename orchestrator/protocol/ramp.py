"""How large the global batch and how long the sequences of each step are.

Both are functions of the tokens that were trained on, and so of the step's number: nobody has to
remember them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from orchestrator.protocol.runfile import EMBEDDED, Trainer, TrainingRun


class Change(NamedTuple):
    """What is different from the first step on that begins when so many tokens were trained on."""

    tokens: int
    batch: int | None = None
    """Samples of a step; None: as many as before."""
    length: int | None = None
    """Tokens of a sample."""
    micro: int | None = None
    """Samples of a micro-batch."""


class Stage(NamedTuple):
    """Steps with batches of one size and sequences of one length."""

    step: int
    """The first, 1-based."""
    sample: int
    """Its first, of the run."""
    tokens: int
    """What was trained on before it."""
    batch: int
    length: int
    micro: int | None = None
    """Samples of a micro-batch; None: as the run file has it."""


class Ramp:
    """The stages of a run, of which each begins with a step: steps are never cut.

    Args:
        batch: samples of the first step.
        length: tokens of its samples.
        changes: what becomes different later on; of equally many tokens, all of them.
    """

    def __init__(self, batch: int, length: int, changes: Iterable[Change]) -> None:
        stages = [Stage(1, 0, 0, batch, length)]
        for change in sorted(changes, key=lambda change: change.tokens):
            before = stages[-1]
            # The step that reaches the number of tokens is still of the old size.
            size = before.batch * before.length
            steps = max(-(-(change.tokens - before.tokens) // size), 0)
            now = Stage(
                before.step + steps,
                before.sample + steps * before.batch,
                before.tokens + steps * size,
                change.batch or before.batch,
                change.length or before.length,
                change.micro or before.micro,
            )
            # What changes with the same step is one stage.
            stages[len(stages) - (steps == 0) :] = [now]
        self.stages = tuple(stages)

    @classmethod
    def of(cls, job: Trainer) -> Ramp:
        """Return that of a run."""
        batches = [Change(change.tokens, batch=change.global_batch) for change in job.batch_ramp]
        lengths = [
            Change(change.tokens, length=change.seq_len, micro=change.micro_batch)
            for change in job.length_ramp
        ]
        return cls(job.global_batch, job.seq_len, [*batches, *lengths])

    def batch(self, step: int) -> int:
        """Return the samples of a step (1-based)."""
        return self.stage(step).batch

    def consumed(self, steps: int) -> int:
        """Return the samples of the first so many steps together.

        >>> ramp = Ramp(2, 10, [Change(50, batch=4), Change(100, length=20)])
        >>> [ramp.consumed(steps) for steps in range(6)]
        [0, 2, 4, 6, 10, 14]
        """
        stage = self.stage(steps + 1)
        return stage.sample + (steps + 1 - stage.step) * stage.batch

    def stage(self, step: int) -> Stage:
        """Return the stage that a step (1-based) is of."""
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage.step) - 1]

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """The first sample, and the length of it and of those that follow, wherever it changes.

        >>> Ramp(2, 10, [Change(50, batch=4), Change(100, length=20)]).lengths
        [(0, 10), (10, 20)]
        """
        found: list[tuple[int, int]] = []
        for stage in self.stages:
            if not found or found[-1][1] != stage.length:
                found.append((stage.sample, stage.length))
        return found


def job_at(job: Trainer, step: int) -> Trainer:
    """Return a job with the batch, the micro-batch and the length of sequences of this step."""
    return at_stage(job, Ramp.of(job).stage(step))


def at_stage(job: Trainer, stage: Stage) -> Trainer:
    """Return a job as it is in one of its stages."""
    return msgspec.structs.replace(
        job,
        global_batch=stage.batch,
        seq_len=stage.length,
        micro_batch=stage.micro or job.micro_batch,
    )


def uneven(run: TrainingRun, count: int) -> bool:
    """Return whether so many replicas take unequal shares in any stage of a run; unknown: False."""
    trainer = run.spec.trainer
    if trainer.entrypoint != EMBEDDED:
        return False
    for stage in Ramp.of(trainer).stages:
        job = at_stage(trainer, stage)
        if job.micro_batch or job.reduction == "deterministic":
            rounds = job.global_batch // ((job.micro_batch or 1) * run.layout.dp_shard)
            if rounds % count:
                return True
    return False
