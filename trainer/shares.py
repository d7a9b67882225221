"""Who takes which samples of a global batch, for any number of replicas.

The global batch is cut into micro-batches of one size, and those into rounds of one micro-batch
for each rank of a replica. Replicas take as equal numbers of rounds as there are. The ranks of a
replica always take the same number: they meet in every pass, to put the weights together, and
replicas meet only once a step. So shares may be uneven without anybody passing in vain.
"""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.protocol import runfile


class Place(NamedTuple):
    """Where a rank stands among those that train on different data."""

    replica: int
    replicas: int
    shard: int
    shards: int
    """Ranks of a replica."""


def micro_batches(job: runfile.Trainer, place: Place) -> list[range]:
    """Return the samples of each of a rank's micro-batches, as indices of the global batch.

    The shares of all ranks together are the global batch, each sample once. Without `microBatch`
    a rank takes its whole share at once.
    """
    replica, replicas, shard, shards = place
    size = job.micro_batch or job.global_batch // (replicas * shards)
    rounds = job.global_batch // (shards * size)
    assert rounds * shards * size == job.global_batch, "read_job looked at this"
    begin, end = (rounds * r // replicas for r in (replica, replica + 1))
    first = begin * shards + (end - begin) * shard
    return [range(at * size, (at + 1) * size) for at in range(first, first + end - begin)]
