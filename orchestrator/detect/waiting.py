"""Who waits for whom in collectives, and who lets all the others wait.

A rank that waits in a collective waits for every member of the group that has not entered it. Who
is waited for and waits for nobody is the culprit, however late it is noticed; the first whose
timeout fires is mostly a victim.

Letters in array names: G groups, R ranks of the world, M memberships of ranks in groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.protocol.groups import is_connection
from orchestrator.protocol.messages import GroupCounts


class Counts(NamedTuple):
    """Who has entered and left how many collectives of which group: columns of shape [M].

    A rank of 16,384 is in some ten of as many groups: of a matrix, nearly all would be empty.
    """

    group: npt.NDArray[np.int64]
    """Numbers of groups, from 0 on."""
    rank: npt.NDArray[np.int64]
    entered: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    apart: npt.NDArray[np.bool_]
    """Whether it is a connection, over which one sends and the other receives."""

    @property
    def waits(self) -> npt.NDArray[np.bool_]:
        """Where a rank waits in a collective of a group."""
        return self.entered > self.left

    def where(self, kept: npt.NDArray[np.bool_]) -> Counts:
        """Return some of the rows."""
        return Counts(
            self.group[kept], self.rank[kept], self.entered[kept], self.left[kept], self.apart[kept]
        )


def gathered(told: Iterable[GroupCounts], world: int) -> tuple[Counts, list[str]]:
    """Return what was told of groups as columns, and what the groups are called by number.

    Args:
        told: the newest last: of a rank in a group it is what counts.
        world: ranks of the world.
    """
    numbers: dict[str, int] = {}
    group: list[int] = []
    rank: list[int] = []
    entered: list[int] = []
    left: list[int] = []
    for row in told:
        group += [numbers.setdefault(row.group, len(numbers))] * len(row.ranks)
        rank += row.ranks
        entered += row.entered
        left += row.left
    group_M, rank_M, entered_M, left_M = (
        np.array(column, np.int64) for column in (group, rank, entered, left)
    )
    # The last of those that are of the same rank in the same group.
    key_M = (group_M * world + rank_M)[::-1]
    newest = len(key_M) - 1 - np.unique(key_M, return_index=True)[1]
    names = list(numbers)
    apart_G = np.array([is_connection(name) for name in names], np.bool_)
    rows = Counts(
        group_M[newest], rank_M[newest], entered_M[newest], left_M[newest], apart_G[group_M[newest]]
    )
    return rows, names


def culprits_among(
    counts: Counts, world: int, elsewhere_R: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int64]:
    """Return the ranks that others wait for and that wait for nobody, ascending.

    Args:
        counts: of every group.
        world: ranks of the world.
        elsewhere_R: who waits in something of which no group is known, shape [R]: for whom, nobody
            can say, so that it is not at fault as far as is known.

    Returns:
        Rank indices, shape [K], int64. Empty if nobody waits, or all who wait have been joined:
        then what they wait in is itself stuck. Also empty for ranks that wait for each other.

    Source: own rule. The graph is never built: an edge leads from who waits to all that have
    entered fewer, so that the least and the most that members have entered tell. Cost: O(M).
    """
    group_M, rank_M = counts.group, counts.rank
    entered_M, waits_M = counts.entered, counts.waits
    groups = int(group_M.max(initial=-1)) + 1
    least_G = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(least_G, group_M, entered_M)
    most_G = np.full(groups, -1, np.int64)
    np.maximum.at(most_G, group_M[waits_M], entered_M[waits_M])
    held_up_R = np.zeros(world, np.bool_)
    if elsewhere_R is not None:
        held_up_R |= elsewhere_R
    held_up_R[rank_M[waits_M & ((entered_M > least_G[group_M]) | counts.apart)]] = True
    awaited_R = np.zeros(world, np.bool_)
    awaited_R[rank_M[entered_M < most_G[group_M]]] = True
    return np.flatnonzero(awaited_R & ~held_up_R)


def culprits(
    entered_GR: npt.NDArray[np.int64],
    left_GR: npt.NDArray[np.int64],
    member_GR: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    """Return `culprits_among` of few groups, given as one row each.

    Args:
        entered_GR: collectives that each rank has entered in each group, shape [G, R].
        left_GR: collectives that it has left, shape [G, R].
        member_GR: who is in which group, shape [G, R].

    >>> one = np.ones((1, 4), bool)
    >>> culprits(np.array([[7, 7, 6, 7]]), np.array([[6, 6, 6, 6]]), one)
    array([2])
    """
    group_M, rank_M = np.nonzero(member_GR)
    counts = Counts(
        group_M,
        rank_M,
        entered_GR[member_GR],
        left_GR[member_GR],
        np.zeros(len(group_M), np.bool_),
    )
    return culprits_among(counts, member_GR.shape[1])


def minority(key_R: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the ranks that do what fewest do, if that is fewer than half of them; else nobody.

    >>> minority(np.array([3, 3, 5, 3]))
    array([2])
    """
    _, place_R, counts = np.unique(key_R, return_inverse=True, return_counts=True)
    if (
        len(counts) < 2
        or 2 * int(counts.min()) >= len(key_R)
        or int((counts == counts.min()).sum()) > 1
    ):
        return np.empty(0, np.int64)
    return np.flatnonzero(counts[place_R] == counts.min())
