"""Arrays of ids that lie apart, read as if they were one."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

NOTHING: npt.NDArray[np.uint32] = np.empty(0, np.uint32)


class Ids(Protocol):
    """Token ids: an array, or several that are read as one."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: slice, /) -> npt.NDArray[np.uint32]: ...


class Joined:
    """Arrays one behind the other, of which slices are copied together.

    >>> Joined([np.arange(3, dtype=np.uint32), NOTHING, np.arange(9, dtype=np.uint32)])[2:5]
    array([2, 0, 1], dtype=uint32)
    """

    def __init__(self, parts: Sequence[Ids]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, at: slice, /) -> npt.NDArray[np.uint32]:
        start, stop, step = at.indices(len(self))
        assert step == 1
        pieces = []
        for number in range(bisect_right(self._ends, start), len(self._parts)):
            begin = self._ends[number] - len(self._parts[number])
            if begin >= stop:
                break
            pieces.append(self._parts[number][max(start - begin, 0) : stop - begin])
        return np.concatenate(pieces) if pieces else NOTHING
