"""Which node's memory holds which shard: per step, by node, with the number of copies kept.

Asked from both sides: what is lost with a node, and whether every rank still has a copy. So what
nodes hold is entered by node, and how many hold it is one array over the ranks. A state that all
nodes hold alike, which is nearly every one, is entered in one stroke.

Letters in array names: R ranks of the world.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import numpy as np
import numpy.typing as npt

from orchestrator.protocol.ids import NodeId, Rank, Step

Share = frozenset[Rank]
"""Ranks whose shards a node holds."""
_NOTHING: Share = frozenset()


class Copies:
    """The copies of one step.

    Args:
        world_size: ranks of the world.
        held: what each node holds.
    """

    def __init__(self, world_size: int, held: Mapping[NodeId, Share] | None = None) -> None:
        self._held: dict[NodeId, Share] = dict(held or {})
        self._count_R = _counted(self._held.values(), world_size)
        self._whole: bool | None = None

    def copy(self) -> Copies:
        """Return the same once more."""
        twin = Copies(0)
        twin._become(self)
        return twin

    def _become(self, other: Copies) -> None:
        self._held, self._count_R = dict(other._held), other._count_R.copy()
        self._whole = other._whole

    def add(self, node: NodeId, ranks: Share) -> None:
        """Enter that a node holds these, too."""
        before = self._held.get(node, _NOTHING)
        if new := ranks - before:
            self._held[node] = before | new
            self._count_R[list(new)] += 1
            self._whole = None

    def add_all(self, other: Copies) -> None:
        """Enter all that `other` has."""
        theirs = other._held
        if all(ranks <= theirs.get(node, _NOTHING) for node, ranks in self._held.items()):
            # What was staged is copied: nearly always the one is a part of the other.
            self._become(other)
            return
        for node, ranks in theirs.items():
            self.add(node, ranks)

    def discard(self, node: NodeId, ranks: Share | None = None) -> None:
        """Strike off what a node holds of `ranks`; default all of it."""
        before = self._held.get(node, _NOTHING)
        gone = before if ranks is None else before & ranks
        if not gone:
            return
        if left := before - gone:
            self._held[node] = left
        else:
            del self._held[node]
        self._count_R[list(gone)] -= 1
        self._whole = None

    def discard_all(self, nodes: Iterable[NodeId]) -> None:
        """Strike off all that some nodes hold."""
        gone = [ranks for node in nodes if (ranks := self._held.pop(node, None)) is not None]
        if gone:
            self._count_R -= _counted(gone if self._held else (), len(self._count_R))
            self._whole = None
        if not self._held:
            self._count_R[:] = 0

    def of(self, node: NodeId) -> Share:
        """Return what a node holds."""
        return self._held.get(node, _NOTHING)

    @property
    def whole(self) -> bool:
        """Whether there is a copy of every rank's shard."""
        if self._whole is None:
            self._whole = bool(self._count_R.all())
        return self._whole

    def holders(self, rank: Rank) -> list[NodeId]:
        """Return who holds a shard, sorted."""
        if not self._count_R[rank]:
            return []
        return sorted(node for node, ranks in self._held.items() if rank in ranks)

    def ranks(self) -> list[Rank]:
        """Return the ranks of which there is a copy, ascending."""
        return [Rank(int(rank)) for rank in np.flatnonzero(self._count_R)]

    def count_R(self, without: Iterable[NodeId] = ()) -> npt.NDArray[np.int32]:
        """Return how many copies each rank has, not counting those of some nodes."""
        counted_R = self._count_R.copy()
        for node in without:
            if held := self.of(node):
                counted_R[list(held)] -= 1
        return counted_R


def _counted(shares: Iterable[Share], world_size: int) -> npt.NDArray[np.int32]:
    """Return in how many of the shares each rank is, shape [R]."""
    ranks = np.fromiter(chain.from_iterable(shares), np.int64)
    return np.bincount(ranks, minlength=world_size).astype(np.int32)


class Holdings:
    """The copies of every step that is in memory anywhere.

    Args:
        world_size: ranks of the world.
    """

    def __init__(self, world_size: int) -> None:
        self._none = Copies(world_size)
        self._steps: dict[Step, Copies] = {}

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, step: object) -> bool:
        return step in self._steps

    def of(self, step: Step) -> Copies:
        """Return the copies of a step, to be read; none, if there is none."""
        return self._steps.get(step, self._none)

    def add(self, step: Step, node: NodeId, ranks: Share) -> None:
        """Enter that a node holds these shards of a step, too."""
        if ranks:
            if step not in self._steps:
                self._steps[step] = self._none.copy()
            self._steps[step].add(node, ranks)

    def spread(self, step: Step, copies: Copies) -> None:
        """Enter that these copies of a step are there, besides those that are known."""
        if (known := self._steps.get(step)) is not None:
            known.add_all(copies)
        else:
            self._steps[step] = copies.copy()

    def discard(self, step: Step, node: NodeId, ranks: Share) -> None:
        """Strike off copies of a step."""
        if step in self._steps:
            self._steps[step].discard(node, ranks)

    def discard_all(self, step: Step, nodes: Iterable[NodeId]) -> None:
        """Strike off all that some nodes hold of a step."""
        if step in self._steps:
            self._steps[step].discard_all(nodes)

    def forget(self, node: NodeId) -> None:
        """Strike off all that a node holds."""
        for copies in self._steps.values():
            copies.discard(node)

    def drop(self, steps: Iterable[Step]) -> None:
        """Strike off all copies of some steps."""
        for step in tuple(steps):
            self._steps.pop(step, None)

    def held_by(self, node: NodeId) -> dict[Step, Share]:
        """Return what a node holds, by step, ascending."""
        return {
            step: ranks for step in sorted(self._steps) if (ranks := self._steps[step].of(node))
        }
