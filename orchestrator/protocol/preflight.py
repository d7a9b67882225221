"""What a program that tests a device says at its end, as one line of JSON."""

from __future__ import annotations

import msgspec


class Came(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    compared: int = 0
    """Answers that were compared with what is known beforehand."""
    wrong: str = ""
    """The first that was not what it must be; "" if all were."""
    problem: str = ""
    """Why not everything was compared; "" if it was."""
