"""How far a rank has come from where it would be: of a fault that nobody looks for.

A sum of floating-point numbers depends on their order, and a run goes another way for that alone.
So what it comes to is compared with what several runs come to that differ only in which sample of
a global batch is added up in whose place: nothing is wrong with any of those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.protocol.trials import Gap
from trainer import parallel
from trainer.data import Batch, Batches
from trainer.step import Training


class End(NamedTuple):
    """What some steps came to."""

    loss: float
    """Mean, of samples that none of them learned from."""
    weights: Tensor
    """All of them, in a row, as float64."""


@torch.no_grad()
def end_of(training: Training, samples: Batches) -> End:
    """Return what a training has come to on this rank, by the samples of the run's last step."""
    step, count = training.job.steps, training.stage.batch
    (model,) = training.stages
    losses = []
    for index in range(count):
        micro = training.micro(samples.batch(step, range(index, index + 1)))
        # In float32, a loss is no finer than what clean runs differ by.
        logits = model(micro.inputs, micro.cuts).double().flatten(0, 1)
        losses.append(float(F.cross_entropy(logits, micro.targets.flatten(), reduction="sum")))
    parallel.let_go(model)
    rows = [shard.param.detach().reshape(-1).double() for shard in training.optimizer.shards]
    return End(math.fsum(losses) / training.tokens, torch.cat(rows))


def gap(one: End, others: Sequence[End]) -> Gap:
    """Return how far an end is from the furthest of some others; None of no finite number."""
    loss = max(abs(one.loss - other.loss) for other in others)
    weights = max(
        float((one.weights - other.weights).norm() / other.weights.norm()) for other in others
    )
    return Gap(
        loss=loss if math.isfinite(one.loss) else None,
        weights=weights if bool(one.weights.isfinite().all()) else None,
    )


class Reordered:
    """The samples of each step, each in the place of another one of the same step.

    Args:
        samples: in their order.
        training: that learns from them.
        seed: of the places.
    """

    def __init__(self, samples: Batches, training: Training, seed: int) -> None:
        self._samples, self._training, self._seed = samples, training, seed

    @property
    def mark(self) -> float:
        """Of what lies on disk."""
        return self._samples.mark

    def batch(self, step: int, indices: range) -> Batch:
        """Return the samples that are now at these indices of the global batch of `step`."""
        chance = np.random.Generator(np.random.Philox(key=[self._seed, step]))
        places = chance.permutation(self._training.stage.batch)
        parts = [self._samples.batch(step, range(at, at + 1)) for at in places[indices].tolist()]
        return Batch(
            np.concatenate([part.inputs for part in parts]),
            np.concatenate([part.targets for part in parts]),
            [row for part in parts for row in part.cuts],
        )
