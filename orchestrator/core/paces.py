"""How long each rank computes for the same work: the last windows of it, one row a window.

A window is a look at which every rank has completed a step since the one before: the last step of
each. Letters in array names: W windows, R ranks of the world.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

WINDOWS = 10
"""Kept of a generation, the newest."""


class Paces:
    """Of one generation.

    Args:
        world_size: how many ranks there are.
    """

    def __init__(self, world_size: int) -> None:
        self._size = world_size
        self._rows: deque[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = deque(
            maxlen=WINDOWS
        )
        self._told: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
        """What the newest window was made of."""
        self._alike_windows = 0
        """How many windows in a row, up to the newest, were made of the same."""
        self._step_R: npt.NDArray[np.int64] | None = None
        """Steps completed at the newest window, shape [R], or [1] if all had completed as many."""
        self._rate_R: npt.NDArray[np.float64] | None = None
        self._ratio_R: npt.NDArray[np.float64] | None = None
        self._time_R: npt.NDArray[np.float64] | None = None
        self._slowest_s: tuple[tuple[int, ...], float] | None = None
        self.looks = 0
        """How many windows there have been."""
        self.alike = False
        """Whether it was said last that all take as long as each other."""

    def observe(
        self, steps: tuple[int, ...], compute_s: tuple[float, ...], work: tuple[float, ...]
    ) -> None:
        """Take in one tick of columns over all ranks; a column of length one is of every rank."""
        self.alike = len(compute_s) == len(work) == 1 and compute_s[0] > 0
        if len(compute_s) == len(work) == 1:
            # All are as fast as each other, or nobody measures it: there is nothing to compare.
            if self._rows:
                self._rows.clear()
            self._step_R = None
            self._alike_windows = 0
            self._forget()
            return
        step_R = np.asarray(steps, np.int64)
        if self._step_R is not None and not bool((step_R > self._step_R).all()):
            return
        if bool((step_R <= 0).any()):
            return
        self._step_R = step_R
        # A simulated rank is as slow as it was, for hours: one row is enough for such windows.
        if self._alike_windows and self._told == (compute_s, work):
            self._rows.append(self._rows[-1])
        else:
            self._told, self._alike_windows = (compute_s, work), 0
            compute_s_R = np.broadcast_to(np.asarray(compute_s, np.float64), self._size)
            work_R = np.broadcast_to(np.asarray(work, np.float64), self._size)
            self._rows.append((compute_s_R, work_R))
        self._alike_windows += 1
        self.looks += 1
        if not self.as_at(self.looks - 1):
            self._forget()

    def _forget(self) -> None:
        """Drop what follows from windows that there are no more."""
        self._rate_R = self._ratio_R = self._time_R = self._slowest_s = None

    @property
    def full(self) -> bool:
        """Whether there are as many windows as are kept."""
        return len(self._rows) == WINDOWS

    def as_at(self, looks: int) -> bool:
        """Whether each window is the same as every one was after so many looks: nothing is new."""
        return self._alike_windows >= WINDOWS + self.looks - looks

    def compute_s_WR(self) -> npt.NDArray[np.float64]:
        """Return seconds of computing in each window, shape [W, R], oldest first; 0 unmeasured."""
        return np.stack([compute_s_R for compute_s_R, _ in self._rows])

    def work_WR(self) -> npt.NDArray[np.float64]:
        """Return what was computed in them, shape [W, R]; 1 where nobody said."""
        work_WR = np.stack([work_R for _, work_R in self._rows])
        return np.where(work_WR > 0, work_WR, 1.0)

    def rate_R(self) -> npt.NDArray[np.float64]:
        """Return seconds for a unit of work, the median of the windows, shape [R]."""
        # Asked for each suspect, and the same for all of them.
        if self._rate_R is None:
            self._rate_R = middle(self.compute_s_WR() / self.work_WR())
        return self._rate_R

    def ratio_R(self, peers_R: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return times the median of its peers' rate that each rank takes, shape [R].

        Asked at every event of whoever was found slow, and the same until the next window.

        Args:
            peers_R: ranks with the same number are compared, shape [R]: the same each time.
        """
        if self._ratio_R is None:
            rate_R = self.rate_R()
            self._ratio_R = np.empty_like(rate_R)
            for number in np.unique(peers_R):
                of_group_R = peers_R == number
                group_R = rate_R[of_group_R]
                self._ratio_R[of_group_R] = group_R / np.median(group_R)
        return self._ratio_R

    def time_R(self) -> npt.NDArray[np.float64]:
        """Return seconds of computing in a step, the median of the windows, shape [R]."""
        if self._time_R is None:
            self._time_R = middle(self.compute_s_WR())
        return self._time_R

    def slowest_s(self, without: tuple[int, ...]) -> float:
        """Return for how long the slowest of all ranks but some computes; 0 if there is no other.

        Asked at every event while somebody is slow, and mostly the same.
        """
        if self._slowest_s is None or self._slowest_s[0] != without:
            others_R = np.delete(self.time_R(), list(without))
            self._slowest_s = (without, float(others_R.max()) if len(others_R) else 0.0)
        return self._slowest_s[1]


def middle(x_WR: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the median over windows, shape [R]; nothing may be NaN.

    What `numpy.median` gives, to the bit, in a third of its time: to sort ten numbers takes less
    than to part them.

    >>> middle(np.array([[3.0], [1.0], [4.0], [2.0]]))
    array([2.5])
    """
    sorted_WR: npt.NDArray[np.float64] = np.sort(x_WR, axis=0)
    low, high = (len(sorted_WR) - 1) // 2, len(sorted_WR) // 2
    middle_R: npt.NDArray[np.float64] = (sorted_WR[low] + sorted_WR[high]) / 2
    return middle_R
