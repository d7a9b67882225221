"""Where a rank stands in the dimensions of a parallel world, and which part of the state it holds.

Whoever must know which ranks hold the same shard asks here: the trainer, the agents' orders, the
report, the simulator. Ranks are counted with dpReplicate slowest, then pp, dpShard, cp and tp: the
ranks of a replica follow each other, and a rank's number modulo the shards is its shard in a world
of any number of replicas. The published order is the same: tp within cp within pp within data
parallelism (arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Position(NamedTuple):
    """The coordinates of a rank, slowest first."""

    dp_replicate: int
    pp: int
    dp_shard: int
    cp: int
    tp: int


class Layout(NamedTuple):
    """How a world is cut, and so how its state is: the size of each dimension, slowest first.

    A replica is one of `dpReplicate` copies of the model; the ranks of one hold all of the state
    between them, each a shard of its own.
    """

    dp_replicate: int = 1
    pp: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    def __str__(self) -> str:
        sizes = zip(("dpReplicate", "pp", "dpShard", "cp", "tp"), self, strict=True)
        return " x ".join(f"{name} {n}" for name, n in sizes if n > 1 or name.startswith("dp"))

    @property
    def world_size(self) -> int:
        """Ranks of the world."""
        return math.prod(self)

    @property
    def shard_count(self) -> int:
        """How many different shards the state has: replicas share theirs."""
        return self.world_size // self.dp_replicate

    @property
    def readers(self) -> int:
        """How many different shares a global batch has: other ranks work on one together."""
        return self.dp_replicate * self.dp_shard

    def position(self, rank: int) -> Position:
        """Return where a rank stands.

        >>> Layout(pp=2, dp_shard=2, tp=2).position(5)
        Position(dp_replicate=0, pp=1, dp_shard=0, cp=0, tp=1)
        """
        found = []
        for size in reversed(self):
            rank, at = divmod(rank, size)
            found.append(at)
        return Position(*reversed(found))

    def replica_of(self, rank: int) -> int:
        """Return which replica a rank is part of; the first one writes what all of them hold."""
        return rank // self.shard_count

    def shard_of(self, rank: int) -> int:
        """Return the number of the shard that a rank holds, in [0, `shard_count`).

        >>> [Layout(pp=2, dp_replicate=2, tp=2).shard_of(rank) for rank in range(8)]
        [0, 1, 2, 3, 0, 1, 2, 3]
        """
        return rank % self.shard_count

    def shards(self) -> npt.NDArray[np.int64]:
        """Return the number of every rank's shard, shape [world_size]; not to be written to."""
        return _shards(self)

    def rank_of(self, shard: int, replica: int = 0) -> int:
        """Return the rank that holds a shard in a replica."""
        return replica * self.shard_count + shard

    def ranks_of(self, replica: int) -> list[int]:
        """Return the ranks of a replica, ascending, which is in the order of their shards."""
        return [self.rank_of(shard, replica) for shard in range(self.shard_count)]


@lru_cache
def _shards(layout: Layout) -> npt.NDArray[np.int64]:
    return np.array([layout.shard_of(rank) for rank in range(layout.world_size)])
