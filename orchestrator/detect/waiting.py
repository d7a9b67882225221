"""Who waits for whom in collectives, and who lets all the others wait.

A rank that waits in a collective waits for every member of the group that has not entered it. Who
is waited for and waits for nobody is the culprit, however late it is noticed; the first whose
timeout fires is mostly a victim.

Letters in array names: G groups, R ranks of the world.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def culprits(
    entered_GR: npt.NDArray[np.int64],
    left_GR: npt.NDArray[np.int64],
    member_GR: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    """Return the ranks that others wait for and that wait for nobody, ascending.

    Args:
        entered_GR: collectives that each rank has entered in each group, shape [G, R].
        left_GR: collectives that it has left, shape [G, R].
        member_GR: who is in which group, shape [G, R].

    Returns:
        Rank indices, shape [K], int64. Empty if nobody waits, or all who wait have been joined:
        then what they wait in is itself stuck. Also empty for ranks that wait for each other.

    Source: own rule. The graph is never built: an edge leads from who waits to all that have
    entered fewer, so that the least and the most that members have entered tell. Cost: O(G R).

    >>> one = np.ones((1, 4), bool)
    >>> culprits(np.array([[7, 7, 6, 7]]), np.array([[6, 6, 6, 6]]), one)
    array([2])
    """
    waits_GR = member_GR & (entered_GR > left_GR)
    least_G1 = np.where(member_GR, entered_GR, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    most_G1 = np.where(waits_GR, entered_GR, -1).max(axis=1, keepdims=True)
    held_up_R = (waits_GR & (entered_GR > least_G1)).any(axis=0)
    awaited_R = (member_GR & (entered_GR < most_G1)).any(axis=0)
    return np.flatnonzero(awaited_R & ~held_up_R)


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
