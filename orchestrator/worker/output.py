"""Where a rank's output goes: to a file per rank, whichever process has the seat."""

from __future__ import annotations

import os
import sys


def redirect(log: str) -> None:
    """Append what this process prints to `log` from now on; "" leaves it where it goes."""
    if not log:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        print(f"output stays here: {error}", file=sys.stderr)  # noqa: T201 - it is the output
        return
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
