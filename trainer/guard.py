"""Calls what looks for wrong state, and goes without it once it has raised.

Whoever looks may be wrong itself, and must not stop what it looks at. A rank that looks no more
says so to the others in what they exchange anyway: nobody waits for it, or takes it for different.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Told(Protocol):
    """Who hears that a detector is off; `orchestrator.worker.Worker` does."""

    def detector_failed(self, detector: str, reason: str) -> None:
        """Hear that this rank goes on without a detector."""


class Guard:
    """Of one detector of a rank.

    Args:
        detector: its name, as people are told.

    Attributes:
        reason: what it raised, or why it was given up; "" while it works.
        given_up: whether all ranks know that it is off, and why.
        stopped: whether ranks go without it, this one or another one: there is nobody to compare
            with.
    """

    def __init__(self, detector: str) -> None:
        self._detector = detector
        self.reason = ""
        self.given_up = False
        self.stopped = False
        self._told = False

    @property
    def off(self) -> bool:
        """Whether it raised or was given up, and is asked no more."""
        return bool(self.reason)

    def call(self, look: Callable[[], T], otherwise: T) -> T:
        """Return what a detector says; `otherwise` if it raises, or has.

        Nothing else belongs into `look`: no collective, which others would wait in for ever, and
        no word to the agent, which may answer that the generation is over.
        """
        if self.off:
            return otherwise
        try:
            return look()
        except Exception as error:  # noqa: BLE001 - a broken detector must not stop training
            traceback.print_exception(error)
            self.reason = f"{type(error).__name__}: {error}"
            return otherwise

    def give_up(self, reason: str, *, tells: bool) -> None:
        """Ask it no more, on any rank: it works, and what it says means nothing.

        Args:
            reason: why; all ranks know it.
            tells: whether this rank is one of those that say it.
        """
        self.reason, self.given_up = self.reason or reason, True
        self.stopped, self._told = True, self._told or not tells

    def stop(self) -> None:
        """Hear that some rank goes without it."""
        self.stopped = True

    def tell(self, told: Told) -> None:
        """Say once that it is off, if it is."""
        if self.off and not self._told:
            self._told = True
            told.detector_failed(self._detector, self.reason)
