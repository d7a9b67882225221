"""How long each rank computes for the same work: the last windows of it, one row a window.

A window is a look at which every rank has completed a step since the one before: what each took for
a step of those, on average. Letters in array names: W windows, R ranks of the world.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.core.incident import Clock

WINDOWS = 10
"""Kept of a generation, the newest: they tell how much what ranks take differs by chance."""
STEPS = 10
"""Covered by those of them that tell who is slow now."""
SPAN_S = 1.0
"""That they cover, too, as long as there are so many: steps of milliseconds are slow together for
as long as another program has the core. Beside one that has it for 0.7 s of each second, ten steps
of 30 ms looked like a slow device once in 500 steps; a second of them did not in 6,000. With two
seconds, four of twelve slow devices were found later than 20 steps of 0.13 s."""
WINDOWS_MIN = 3
"""Of which there are as many, however many steps are in one: what happens once is in one of them,
or on the border of two."""


class Window(NamedTuple):
    """What every rank took for a step, arrays of shape [R]."""

    compute_s: npt.NDArray[np.float64]
    busy_s: npt.NDArray[np.float64]
    work: npt.NDArray[np.float64]
    steps: int
    """How many steps that is of, at least."""


class Paces:
    """Of one generation.

    Args:
        world_size: how many ranks there are.
    """

    def __init__(self, world_size: int) -> None:
        self._size = world_size
        self._windows: deque[Window] = deque(maxlen=WINDOWS)
        self._told: tuple[tuple[float, ...], ...] = ()
        """What the newest window was made of."""
        self._alike_windows = 0
        """How many windows in a row, up to the newest, were made of the same."""
        self._step_R: npt.NDArray[np.int64] | None = None
        """Steps completed at the newest window, shape [R], or [1] if all had completed as many."""
        self._rate_R: dict[Clock, npt.NDArray[np.float64]] = {}
        self._ratio_R: dict[Clock, npt.NDArray[np.float64]] = {}
        self._time_R: npt.NDArray[np.float64] | None = None
        self._slowest_s: tuple[tuple[int, ...], float] | None = None
        self.looks = 0
        """How many windows there have been."""
        self.newest = 0
        """How many windows, up to the newest, tell who is slow now; 0 if there are too few yet."""
        self.alike = False
        """Whether it was said last that all take as long as each other."""

    def observe(
        self,
        steps: tuple[int, ...],
        compute_s: tuple[float, ...],
        work: tuple[float, ...],
        busy_s: tuple[float, ...] = (0.0,),
    ) -> None:
        """Take in one tick of columns over all ranks; a column of length one is of every rank."""
        same = len(compute_s) == len(work) == len(busy_s) == 1
        self.alike = same and compute_s[0] > 0
        if same:
            # All are as fast as each other, or nobody measures it: there is nothing to compare.
            if self._windows:
                self._windows.clear()
            self._step_R = None
            self._alike_windows = self.newest = 0
            self._forget()
            return
        step_R = np.asarray(steps, np.int64)
        since = self._step_R
        if since is not None and not bool((step_R > since).all()):
            return
        if bool((step_R <= 0).any()):
            return
        self._step_R = step_R
        done = int((step_R - since).min()) if since is not None else 1
        told = (compute_s, busy_s, work)
        # A simulated rank is as slow as it was, for hours: one row is enough for such windows.
        if self._alike_windows and self._told == told:
            self._windows.append(self._windows[-1]._replace(steps=done))
        else:
            self._told, self._alike_windows = told, 0
            self._windows.append(
                Window(self._row(compute_s), self._row(busy_s), self._row(work), done)
            )
        self._alike_windows += 1
        self.looks += 1
        self.newest = self._count()
        if not self.as_at(self.looks - 1):
            self._forget()

    def _row(self, column: tuple[float, ...]) -> npt.NDArray[np.float64]:
        return np.broadcast_to(np.asarray(column, np.float64), self._size)

    def _count(self) -> int:
        """Return how many windows, up to the newest, cover enough steps; 0 if all do not."""
        steps, span_s = 0, 0.0
        for count, window in enumerate(reversed(self._windows), 1):
            steps += window.steps
            span_s += window.steps * float(window.compute_s.max())
            enough = span_s >= SPAN_S or count == WINDOWS
            if count >= WINDOWS_MIN and steps >= STEPS and enough:
                return count
        return 0

    def _forget(self) -> None:
        """Drop what follows from windows that there are no more."""
        self._rate_R, self._ratio_R = {}, {}
        self._time_R = self._slowest_s = None

    @property
    def full(self) -> bool:
        """Whether there are enough windows to tell who is slow."""
        return self.newest > 0

    @property
    def steps(self) -> int:
        """How many steps those cover, at least."""
        return sum(window.steps for window in list(self._windows)[-self.newest :])

    def as_at(self, looks: int) -> bool:
        """Whether each window is the same as every one was after so many looks: nothing is new."""
        return self._alike_windows >= WINDOWS + self.looks - looks

    @property
    def clocks(self) -> tuple[Clock, ...]:
        """By which it is known of every rank how long it computed in each of the newest windows."""
        clocks: tuple[Clock, ...] = ("wall", "processor")
        return tuple(clock for clock in clocks if self.known(clock) == clock)

    def known(self, clock: Clock) -> Clock:
        """Return that clock; the wall clock, if some rank does not say what it took by that."""
        newest = list(self._windows)[-self.newest :]
        if clock == "processor" and all(bool((window.busy_s > 0).all()) for window in newest):
            return clock
        return "wall"

    def compute_s_WR(self, clock: Clock = "wall") -> npt.NDArray[np.float64]:
        """Return seconds of computing in each window, shape [W, R], oldest first; 0 unmeasured."""
        if clock == "processor":
            return np.stack([window.busy_s for window in self._windows])
        return np.stack([window.compute_s for window in self._windows])

    def work_WR(self) -> npt.NDArray[np.float64]:
        """Return what was computed in them, shape [W, R]; 1 where nobody said."""
        work_WR = np.stack([window.work for window in self._windows])
        return np.where(work_WR > 0, work_WR, 1.0)

    def rate_R(self, clock: Clock = "wall") -> npt.NDArray[np.float64]:
        """Return seconds for a unit of work, the median of the newest windows, shape [R]."""
        # Asked for each suspect, and the same for all of them.
        if clock not in self._rate_R:
            rate_WR = self.compute_s_WR(clock) / self.work_WR()
            self._rate_R[clock] = middle(rate_WR[-self.newest :])
        return self._rate_R[clock]

    def ratio_R(
        self, peers_R: npt.NDArray[np.int64], clock: Clock = "wall"
    ) -> npt.NDArray[np.float64]:
        """Return times the median of its peers' rate that each rank takes, shape [R].

        Asked at every event of whoever was found slow, and the same until the next window.

        Args:
            peers_R: ranks with the same number are compared, shape [R]: the same each time.
            clock: by which.
        """
        if clock not in self._ratio_R:
            rate_R = self.rate_R(clock)
            ratio_R = self._ratio_R[clock] = np.empty_like(rate_R)
            for number in np.unique(peers_R):
                of_group_R = peers_R == number
                group_R = rate_R[of_group_R]
                ratio_R[of_group_R] = group_R / np.median(group_R)
        return self._ratio_R[clock]

    def time_R(self) -> npt.NDArray[np.float64]:
        """Return seconds of computing in a step, the median of the newest windows, shape [R]."""
        if self._time_R is None:
            self._time_R = middle(self.compute_s_WR()[-self.newest :])
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
