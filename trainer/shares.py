"""Who takes which samples of a global batch, for any number of replicas.

The global batch is cut into micro-batches of one size, and those into rounds of one micro-batch
for each rank of a replica. Replicas take as equal numbers of rounds as there are. The ranks of a
replica always take the same number: they meet in every pass, to put the weights together, and
replicas meet only once a step. So shares may be uneven without anybody passing in vain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from orchestrator.protocol import runfile
from orchestrator.protocol.ramp import Ramp, at_stage


class Place(NamedTuple):
    """Where a rank stands among those that train on different data."""

    replica: int
    replicas: int
    shard: int
    shards: int
    """Ranks of a replica."""


class Share(NamedTuple):
    """What a rank takes of every global batch."""

    micro_batches: list[range]
    """Its own, in order: the samples of each, as indices of the global batch."""
    rounds: list[range]
    """Of every replica, by replica."""

    @property
    def most(self) -> int:
        """Micro-batches of a rank that takes as many as any."""
        return max(map(len, self.rounds))


def share_of(job: runfile.Trainer, place: Place) -> Share:
    """Return the share of the rank at this place; all together are the global batch, each once.

    With fast reduction a rank takes one stretch of the global batch, without `microBatch` at
    once. With deterministic reduction a round is a stretch, whoever takes it.
    """
    replica, replicas, shard, shards = place
    fixed = job.reduction == "deterministic"
    size = job.micro_batch or (1 if fixed else job.global_batch // (replicas * shards))
    count = job.global_batch // (shards * size)
    assert count * shards * size == job.global_batch, "read_job looked at this"
    borders = [count * r // replicas for r in range(replicas + 1)]
    rounds = [range(borders[r], borders[r + 1]) for r in range(replicas)]
    own = rounds[replica]
    if fixed:
        at = [n * shards + shard for n in own]
    else:
        first = own.start * shards + len(own) * shard
        at = list(range(first, first + len(own)))
    return Share([range(n * size, (n + 1) * size) for n in at], rounds)


def slices(job: runfile.Trainer, place: Place, steps: range) -> Iterator[tuple[int, range]]:
    """Yield the micro-batches of a rank over some steps, in order, as indices of global batches."""
    ramp = Ramp.of(job)
    for stage, after in zip(ramp.stages, (*ramp.stages[1:], None), strict=True):
        end = steps.stop if after is None else min(after.step, steps.stop)
        share = share_of(at_stage(job, stage), place).micro_batches
        for step in range(max(stage.step, steps.start), end):
            for indices in share:
                yield step, indices
