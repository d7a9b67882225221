"""Addresses of a run's checkpoints: FOLDER, FOLDER@STEP, and FOLDER@STEP-ROOT for that very one.

The newest checkpoint of a run that still trains is another one each time, and a step may be
committed again after a rollback. What a run begins from is therefore written out when it is
submitted: every rank of every generation reads the same, and one that has checkpoints of its own
knows what they are marked with without looking.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ROOT_DIGITS = 16
"""Of the manifest's root, which is a SHA-256 in hexadecimal."""
_ADDRESS = re.compile(
    rf"(?P<folder>.+)@(?P<step>[0-9]{{1,15}})(?:-(?P<root>[0-9a-f]{{{ROOT_DIGITS}}}))?", re.DOTALL
)


class Parts(NamedTuple):
    """Of an address."""

    folder: str
    step: int | None = None
    """None for the newest."""
    root: str = ""
    """What the root of its manifest begins with; "" for any."""


def parts(address: str) -> Parts:
    """Take an address apart.

    >>> parts("/runs/narrow@40-00112233445566ff")
    Parts(folder='/runs/narrow', step=40, root='00112233445566ff')
    >>> parts("/runs/narrow")
    Parts(folder='/runs/narrow', step=None, root='')
    """
    if (match := _ADDRESS.fullmatch(address)) is None:
        return Parts(address)
    return Parts(match["folder"], int(match["step"]), match["root"] or "")


def means(pinned: str, asked: str) -> bool:
    """Whether a pinned address may be what became of the one that was asked for.

    >>> means("/runs/narrow@40-00112233445566ff", "/runs/narrow")
    True
    >>> means("/runs/narrow@40-00112233445566ff", "/runs/narrow@50")
    False
    """
    found, wanted = parts(pinned), parts(asked)
    return (
        found.root != ""
        and found.folder == wanted.folder
        and wanted.step in {None, found.step}
        and wanted.root in {"", found.root}
    )
