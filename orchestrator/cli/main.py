"""Where the `holdfast` command begins: with an interrupt it can bear while it is still loading."""

from __future__ import annotations

import gc
import sys

EXIT_INTERRUPTED = 130
"""`errors.Exit.INTERRUPTED`; importing it would be part of what may be interrupted."""


def main() -> None:
    """Run the command line."""
    # Nothing that is imported becomes garbage: to look for some takes a tenth of a short command.
    gc.disable()
    try:
        from orchestrator.cli.commands import app

        gc.enable()
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
