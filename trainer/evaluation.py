"""Computes the loss on documents that are never trained on, between two steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from orchestrator.protocol import runfile
from orchestrator.worker import MisconfiguredError, RankPhase
from trainer import parallel, tensor
from trainer.data import Batch, cut
from trainer.step import Reporter, Training
from trainer.tokens import Tokens


class Held:
    """The samples of the validation split that are evaluated, the same ones each time.

    Each source has as many as its weight asks for, or all that it has.

    Args:
        sources: the text of each source.
        job: `spec.trainer`; its sequence length and evaluation settings count.

    Raises:
        MisconfiguredError: if no source has held back enough for a single sample.
    """

    def __init__(self, sources: Sequence[Tokens], job: runfile.Trainer) -> None:
        self._length = job.seq_len
        total = math.fsum(source.weight for source in sources)
        self._rows = [
            (source, row)
            for source in sources
            for row in range(
                min(
                    max(len(source.held) - 1, 0) // job.seq_len,
                    math.ceil(job.eval_samples * source.weight / total),
                )
            )
        ]
        if not self._rows:
            held = sum(len(source.held) for source in sources)
            raise MisconfiguredError(
                f"spec.trainer.data.validation holds back {held} tokens, expected more than "
                f"spec.trainer.seqLen = {job.seq_len} of one source",
                hint="raise `validation`, add text, or leave evalEverySteps out",
            )

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: range) -> Batch:
        """Return the samples at these indices."""
        rows = [self._rows[at] for at in indices]
        return cut([(s.held, row) for s, row in rows], rows[0][0].bos, self._length)


def evaluate(training: Training, held: Held, reporter: Reporter) -> float:
    """Return the mean loss per token on all of `held`, together with the other ranks.

    Every rank gets the same number. Weights and the state of the optimizer stay as they are; so do
    the bits of every later step. Which rank computes what depends on their number, so the last bits
    of the loss do.
    """
    world, job = training.world, training.job
    replica, replicas, shard, shards = world.place
    ranks, own = replicas * shards, replica * shards + shard
    size = len(training.share.micro_batches[0])
    losses = [0.0]
    (model,) = training.stages  # fitting.py refuses pipelines
    with torch.no_grad(), tensor.losses(world.layout.tp):
        for at in range(0, len(held), size * ranks):
            reporter.phase(RankPhase.EVALUATING, micro_batch=at // (size * ranks))
            first = at + size * own
            share = range(min(first, len(held)), min(first + size, len(held)))
            # All ranks pass together, to put the weights together; one without a share looks on.
            batch = held.batch(share or range(1))
            inputs_BL, targets_BL = (
                torch.from_numpy(np.ascontiguousarray(ids)).to(world.device)
                for ids in (batch.inputs, batch.targets)
            )
            loss = training.loss(model(inputs_BL, batch.cuts), targets_BL)
            if share:
                losses.append(float(loss))
    parallel.let_go(model)
    reporter.entered_collective()
    sums = world.gather([math.fsum(losses)])
    # Ranks that train on the same data have the same losses.
    return math.fsum(row[0] for row in sums) * ranks / world.size / (len(held) * job.seq_len)
