"""What a rank's process can end with, and what may be wrong with a job itself."""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.protocol.ids import Step


class Death(NamedTuple):
    """How a rank's process ends."""

    code: int
    """Exit code; minus the signal's number if a signal ends it."""
    kind: str = ""
    """Class of the exception, if it is one."""
    words: str = ""
    misconfigured: bool = False

    @property
    def traceback(self) -> str:
        """What its agent would have caught; "" if it was no exception."""
        if not self.kind:
            return ""
        return (
            'Traceback (most recent call last):\n  File "trainer.py", line 1, in step\n'
            f"{self.kind}: {self.words}"
        )


class Flaws(NamedTuple):
    """What is wrong with the job itself, wherever it runs."""

    refuses: str = ""
    """In its own words, why it takes no seat; "" if it does."""
    raises_at: Step | None = None
    """The step that does not work out."""
