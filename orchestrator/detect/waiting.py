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
    what: npt.NDArray[np.int64]
    """What the last one is that it has entered, as a place in `titles`."""
    titles: tuple[str, ...] = ("",)
    """What collectives are called; first of all "", of which nothing was said."""

    @property
    def waits(self) -> npt.NDArray[np.bool_]:
        """Where a rank waits in a collective of a group."""
        return self.entered > self.left

    def where(self, kept: npt.NDArray[np.bool_]) -> Counts:
        """Return some of the rows."""
        return Counts(
            self.group[kept],
            self.rank[kept],
            self.entered[kept],
            self.left[kept],
            self.apart[kept],
            self.what[kept],
            self.titles,
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
    what: list[int] = []
    places: dict[str, int] = {"": 0}
    for row in told:
        group += [numbers.setdefault(row.group, len(numbers))] * len(row.ranks)
        rank += row.ranks
        entered += row.entered
        left += row.left
        titles = row.what or ("",) * len(row.ranks)
        what += [places.setdefault(each, len(places)) for each in titles]
    group_M, rank_M, entered_M, left_M, what_M = (
        np.array(column, np.int64) for column in (group, rank, entered, left, what)
    )
    # The last of those that are of the same rank in the same group.
    key_M = (group_M * world + rank_M)[::-1]
    newest = len(key_M) - 1 - np.unique(key_M, return_index=True)[1]
    names = list(numbers)
    apart_G = np.array([is_connection(name) for name in names], np.bool_)
    rows = Counts(
        group_M[newest],
        rank_M[newest],
        entered_M[newest],
        left_M[newest],
        apart_G[group_M[newest]],
        what_M[newest],
        tuple(places),
    )
    return rows, names


def strangers(counts: Counts) -> npt.NDArray[np.int64]:
    """Return the ranks that wait in another collective than most who wait in the same place.

    The n-th collective of a group is the same for all its members, or the program is wrong. By the
    numbers alone nobody is missing then, and nobody goes on.

    Returns:
        Rank indices, shape [K], int64, ascending. Empty if no group has a majority that agrees.
    """
    said_M = counts.waits & (counts.what > 0) & ~counts.apart
    group_M, entered_M, what_M = (
        column[said_M] for column in (counts.group, counts.entered, counts.what)
    )
    _, place_M = np.unique(np.stack((group_M, entered_M)), axis=1, return_inverse=True)
    kinds, kind_M, times = np.unique(
        np.stack((place_M.reshape(-1), what_M)), axis=1, return_inverse=True, return_counts=True
    )
    there = np.bincount(kinds[0], weights=times, minlength=1)
    most = np.zeros(len(there))
    np.maximum.at(most, kinds[0], times)
    odd_K = (2 * most[kinds[0]] > there[kinds[0]]) & (times < most[kinds[0]])
    return np.unique(counts.rank[said_M][odd_K[kind_M.reshape(-1)]])


def strangers_to_peers(counts: Counts, kind_M: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the ranks that wait in another collective than the others of their group and peers.

    Where as many of a group say one thing as another, those at the same place of the mesh tell: in
    groups of one kind, ranks of one program come to the same collectives, also to one that they
    have left since.

    Args:
        counts: of every group.
        kind_M: a number of what each row is of, the same for groups that do the same.

    Returns:
        Rank indices, shape [K], int64, ascending. Empty if nobody disagrees within a group, or
        peers have not been there, or do not come to what either side says.
    """
    said_M = (counts.what > 0) & ~counts.apart
    waits_M = said_M & counts.waits
    places, place_M = np.unique(
        np.stack((counts.group[waits_M], counts.entered[waits_M])), axis=1, return_inverse=True
    )
    least = np.full(places.shape[1], len(counts.titles))
    most = np.zeros_like(least)
    np.minimum.at(least, place_M.reshape(-1), counts.what[waits_M])
    np.maximum.at(most, place_M.reshape(-1), counts.what[waits_M])
    odd: list[int] = []
    for group, entered in places[:, least < most].T:
        here_M = waits_M & (counts.group == group) & (counts.entered == entered)
        kinds = np.unique(kind_M[here_M])
        peers_M = said_M & (counts.entered == entered) & np.isin(kind_M, kinds)
        times = np.bincount(counts.what[peers_M])
        usual = int(times.argmax())
        sides = counts.what[here_M]
        if len(kinds) == 1 and 2 * times[usual] > times.sum() and (sides == usual).any():
            odd += counts.rank[here_M][sides != usual].tolist()
    return np.unique(np.array(odd, np.int64))


def out_of_place(
    entered_KR: npt.NDArray[np.int64], waits_KR: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Return the ranks that came to where others wait by another way than most of these.

    All run the same program, so whoever waits in the n-th collective of a kind has entered as many
    of each other kind as any other that waits there. A rank that left one out has not.

    Args:
        entered_KR: how many collectives of each kind ranks have entered that run the same program,
            shape [K, R].
        waits_KR: where they wait, shape [K, R].

    Returns:
        Rank indices, shape [N], int64, ascending. Empty if all that wait in one place came there in
        the same way, or no majority did.

    >>> waits = np.array([[0, 0, 1], [1, 1, 0]], bool)
    >>> out_of_place(np.array([[4, 3, 4], [1, 1, 0]]), waits).tolist()
    []
    >>> waits = np.array([[0, 0, 0], [1, 1, 1]], bool)
    >>> out_of_place(np.array([[4, 3, 4], [1, 1, 1]]), waits).tolist()
    [1]
    """
    odd: list[int] = []
    for entered_R, waits_R in zip(entered_KR, waits_KR, strict=True):
        for place in np.unique(entered_R[waits_R]):
            here_N = np.flatnonzero(waits_R & (entered_R == place))
            ways_KU, way_N, times_U = np.unique(
                entered_KR[:, here_N], axis=1, return_inverse=True, return_counts=True
            )
            most = int(times_U.argmax())
            if ways_KU.shape[1] > 1 and 2 * times_U[most] > len(here_N):
                odd += here_N[way_N.reshape(-1) != most].tolist()
    return np.unique(np.array(odd, np.int64))


def out_of_order(entered_KR: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the ranks that came to collectives in another order than most did.

    All run the same program, so whoever is behind has entered no more of any kind than who is
    ahead. A rank that left one out and went on is ahead in one kind and behind in another: it waits
    for the others, and they for it, so that nobody in the graph waits for nobody.

    Args:
        entered_KR: how many collectives of each kind ranks have entered that run the same program,
            shape [K, R].

    Returns:
        Rank indices, shape [N], int64: who can be in line with the fewest others. Empty if all are
        in line, or as many are on either side.

    >>> out_of_order(np.array([[8, 7, 8], [3, 4, 3]]))
    array([1])
    """
    kinds_KU, place_R, times_U = np.unique(
        entered_KR, axis=1, return_inverse=True, return_counts=True
    )
    ahead_UU = (kinds_KU[:, :, None] > kinds_KU[:, None, :]).any(axis=0)
    against_U = (ahead_UU & ahead_UU.T) @ times_U
    most_U = against_U == against_U.max(initial=0)
    if int(against_U.max(initial=0)) == 0 or 2 * int(times_U[most_U].sum()) >= entered_KR.shape[1]:
        return np.empty(0, np.int64)
    return np.flatnonzero(most_U[place_R.reshape(-1)])


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
        np.zeros(len(group_M), np.int64),
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
