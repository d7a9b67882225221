"""Where a program writes what it was asked for, and which places are the caller's mistake."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from orchestrator.worker import MisconfiguredError

_OF_THE_PATH = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)
"""What another path would not meet with; a full disk, say, is no mistake of who named it."""


@contextlib.contextmanager
def placing(out: Path) -> Iterator[None]:
    """Look at a place, or make something there, in the block.

    Raises:
        MisconfiguredError: if nothing can be at such a path.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_PATH:
            raise
        raise MisconfiguredError(
            f"nothing can be written there: {error.strerror}: {out}",
            hint="name something new in a folder that is there and can be written",
        ) from error


def require_folder(out: Path) -> None:
    """Raise MisconfiguredError if there is no folder in which to write this."""
    with placing(out):
        if not out.absolute().parent.is_dir():
            raise MisconfiguredError(
                f"no such folder: {out.absolute().parent}", hint="make it first"
            )
