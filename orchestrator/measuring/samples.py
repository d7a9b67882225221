"""What was measured, by the name of what takes so long."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple


class Taken(NamedTuple):
    """One thing that was measured. Seconds."""

    median: float
    least: float
    most: float
    samples: int


class Samples:
    """Samples by name, in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        """Add one. What was seen in the wrong order took no time."""
        self._seconds.setdefault(name, []).append(max(seconds, 0.0))

    def add_all(self, spans: Iterable[tuple[str, float]]) -> None:
        """Add several."""
        for name, seconds in spans:
            self.add(name, seconds)

    def extend(self, other: Samples) -> None:
        """Take in those of another run."""
        for name, seconds in other._seconds.items():
            self._seconds.setdefault(name, []).extend(seconds)

    def taken(self) -> dict[str, Taken]:
        """Return them by name, to the microsecond: files have no more."""
        return {
            name: Taken(
                median=round(statistics.median(seconds), 6),
                least=round(min(seconds), 6),
                most=round(max(seconds), 6),
                samples=len(seconds),
            )
            for name, seconds in self._seconds.items()
        }
