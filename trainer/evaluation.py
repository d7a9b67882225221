"""Computes the loss on documents that are never trained on, between two steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from orchestrator.protocol import runfile
from orchestrator.worker import MisconfiguredError, RankPhase
from trainer import parallel, tensor
from trainer.data import Batch, cut
from trainer.reporter import Reporter
from trainer.step import Training
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
        self.length = job.seq_len
        """Of all samples, also once the run has longer ones: losses are comparable."""
        total = math.fsum(source.weight for source in sources)
        rows = [
            min(
                max(len(source.held) - 1, 0) // job.seq_len,
                math.ceil(job.eval_samples * source.weight / total),
            )
            for source in sources
        ]
        self.sources = [
            (source, count) for source, count in zip(sources, rows, strict=True) if count
        ]
        """Those that have held something back, and how many samples each has."""
        if not self.sources:
            held = sum(len(source.held) for source in sources)
            raise MisconfiguredError(
                f"spec.trainer.data.validation holds back {held} tokens, expected more than "
                f"spec.trainer.seqLen = {job.seq_len} of one source",
                hint="raise `validation`, add text, or leave evalEverySteps out",
            )

    def __len__(self) -> int:
        return sum(count for _, count in self.sources)

    def batch(self, source: Tokens, rows: range) -> Batch:
        """Return these samples of a source."""
        L = self.length
        return cut([(source.held, [(row * L, (row + 1) * L)]) for row in rows], source.bos)


class Evaluation(NamedTuple):
    """What an evaluation came to."""

    loss: float
    """Mean per token."""
    samples: int
    of_sources: dict[str, float]
    """The loss of each source that has held something back, by name."""


def evaluate(training: Training, held: Held, reporter: Reporter) -> Evaluation:
    """Compute the loss on all of `held` together with the other ranks; each gets the same.

    Weights and the state of the optimizer stay as they are, and so do the bits of every later step.
    Which rank computes what depends on their number, and so do the last bits of the loss.
    """
    world = training.world
    own = []
    with torch.no_grad(), tensor.losses(world.layout.tp):
        for source, count in held.sources:
            own.append(_loss_of(training, held, source, count, reporter))
    for stage in training.stages:
        parallel.let_go(stage)
    rows = world.gather(own)
    # Ranks of tp have the same losses, those of cp their parts, and of a pipeline only the last.
    copies = world.layout.tp
    sums = [math.fsum(row[at] for row in rows) / copies for at in range(len(own))]
    of_sources = {
        source.name: loss / (count * held.length)
        for (source, count), loss in zip(held.sources, sums, strict=True)
    }
    return Evaluation(math.fsum(sums) / (len(held) * held.length), len(held), of_sources)


def _loss_of(
    training: Training, held: Held, source: Tokens, count: int, reporter: Reporter
) -> float:
    """Return the sum of losses of this rank's share of a source."""
    world = training.world
    replica, replicas, shard, shards = world.place
    size = len(training.share.micro_batches[0])
    each = size * replicas * shards
    losses = []
    for at in range(0, count, each):
        reporter.phase(RankPhase.EVALUATING, micro_batch=at // each)
        first = at + size * (replica * shards + shard)
        share = range(min(first, count), min(first + size, count))
        # All ranks pass together, to put the weights together; one without a share looks on.
        batch = held.batch(source, share or range(1))
        micro = training.micro(batch)
        loss = training.look(micro)
        if share:
            losses.append(loss)
    return math.fsum(losses)
