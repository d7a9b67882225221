"""Virtual time: what is to happen, and when. Nothing passes but what is on the agenda."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from orchestrator.protocol.ids import Seconds

Act = Callable[[], None]
NEVER = Seconds(float("inf"))


class Agenda:
    """What is due when; of what is due at one moment, first what was entered first.

    Attributes:
        now: virtual seconds since the cluster began to exist.
    """

    def __init__(self) -> None:
        self.now = Seconds(0.0)
        self._due: list[tuple[Seconds, int, Act]] = []
        self._entered = 0

    def at(self, moment: Seconds, act: Act) -> None:
        """Enter what happens at a moment; what should have happened before happens now."""
        self._entered += 1
        heapq.heappush(self._due, (Seconds(max(moment, self.now)), self._entered, act))

    def after(self, seconds: float, act: Act) -> None:
        """Enter what happens `seconds` from now."""
        self.at(Seconds(self.now + seconds), act)

    @property
    def next_at(self) -> Seconds:
        """When the next thing is due."""
        return self._due[0][0] if self._due else NEVER

    def advance(self, moment: Seconds) -> None:
        """Let time pass up to a moment before which nothing is due."""
        assert self.now <= moment <= self.next_at, (self.now, moment, self.next_at)
        self.now = moment

    def perform(self) -> None:
        """Let time pass up to what is due next, and do it."""
        self.now, _, act = heapq.heappop(self._due)
        act()
