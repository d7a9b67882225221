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
        self._bare = _zeros(self._count_R)
        """Of how many ranks there is no copy."""
        self._shared = False
        """Whether another one has the same columns, so that they may not be changed any more."""

    def copy(self) -> Copies:
        """Return the same once more."""
        twin = Copies(0)
        twin._become(self)
        return twin

    def renamed(self, names: Mapping[NodeId, NodeId]) -> Copies:
        """Return the same for other nodes.

        Args:
            names: who holds now what each node held.
        """
        twin = Copies(0)
        twin._become(self)
        twin._rename(names)
        return twin

    def _rename(self, names: Mapping[NodeId, NodeId]) -> None:
        self._held = {names[node]: ranks for node, ranks in self._held.items()}

    def _become(self, other: Copies) -> None:
        self._held, self._count_R, self._bare = other._held, other._count_R, other._bare
        self._shared = other._shared = True

    def _is_still(self, other: Copies) -> bool:
        """Whether it became these, and neither was changed since."""
        return self._held is other._held

    def _change(self) -> None:
        """Have columns of its own, which are about to be changed."""
        if self._shared:
            self._held, self._count_R = dict(self._held), self._count_R.copy()
            self._shared = False

    def add(self, node: NodeId, ranks: Share) -> None:
        """Enter that a node holds these, too."""
        before = self._held.get(node, _NOTHING)
        if new := ranks - before:
            self._change()
            self._held[node] = before | new
            places = list(new)
            self._bare -= _zeros(self._count_R[places])
            self._count_R[places] += 1

    def add_all(self, other: Copies, over: Copies | None = None) -> None:
        """Enter all that `other` has.

        Args:
            other: copies.
            over: what it is known to have all of, and maybe more.
        """
        theirs = other._held
        # Thousands of nodes need not be compared where nothing was changed since these were those.
        known = over is not None and self._is_still(over)
        if known or all(ranks <= theirs.get(node, _NOTHING) for node, ranks in self._held.items()):
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
        self._change()
        if left := before - gone:
            self._held[node] = left
        else:
            del self._held[node]
        places = list(gone)
        self._count_R[places] -= 1
        self._bare += _zeros(self._count_R[places])

    def discard_all(self, nodes: Iterable[NodeId]) -> None:
        """Strike off all that some nodes hold."""
        gone = {node for node in nodes if node in self._held}
        if len(gone) == len(self._held):
            self._held, self._count_R = {}, np.zeros_like(self._count_R)
            self._bare, self._shared = len(self._count_R), False
        elif gone:
            self._change()
            self._count_R -= _counted(map(self._held.pop, gone), len(self._count_R))
            self._bare = _zeros(self._count_R)

    def __len__(self) -> int:
        return len(self._held)

    def of(self, node: NodeId) -> Share:
        """Return what a node holds."""
        return self._held.get(node, _NOTHING)

    def whole(self, first: int | None = None) -> bool:
        """Whether there is a copy of every rank's shard; of the first ones only, or (None) all."""
        return self._bare == 0 if first is None else bool(self._count_R[:first].all())

    def least(self, without: Iterable[NodeId] = (), *, first: int | None = None) -> int:
        """Return how many copies there are of what has the fewest.

        Args:
            without: nodes that do not count.
            first: of the first ranks only, so many; None for all.
        """
        if not self.whole(first):
            return 0
        kept_out = [node for node in without if node in self._held]
        count_R = self.count_R(kept_out) if kept_out else self._count_R
        return int(count_R[:first].min())

    def holders_of(self, ranks: Share) -> dict[Rank, list[NodeId]]:
        """Return who holds each of some shards, sorted: in one look at all nodes."""
        found: dict[Rank, list[NodeId]] = {rank: [] for rank in ranks}
        for node, held in self._held.items():
            if not held.isdisjoint(ranks):
                for rank in held & ranks:
                    found[rank].append(node)
        return {rank: sorted(nodes) for rank, nodes in found.items()}

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
            counted_R[list(self.of(node))] -= 1
        return counted_R


def _counted(shares: Iterable[Share], world_size: int) -> npt.NDArray[np.int32]:
    """Return in how many of the shares each rank is, shape [R]."""
    ranks = np.fromiter(chain.from_iterable(shares), np.int64)
    return np.bincount(ranks, minlength=world_size).astype(np.int32)


def _zeros(count_R: npt.NDArray[np.int32]) -> int:
    return len(count_R) - int(np.count_nonzero(count_R))


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

    def spread(self, step: Step, copies: Copies, over: Copies | None = None) -> None:
        """Enter that these copies of a step are there, besides those that are known.

        Args:
            step: of which they are.
            copies: what is there.
            over: what they are known to have all of, and maybe more.
        """
        if (known := self._steps.get(step)) is not None:
            known.add_all(copies, over)
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
