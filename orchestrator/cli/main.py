"""Where the `holdfast` command begins: with an interrupt it can bear while it is still loading."""

from __future__ import annotations

import sys

EXIT_INTERRUPTED = 130
"""`errors.Exit.INTERRUPTED`; importing it would be part of what may be interrupted."""


def main() -> None:
    """Run the command line."""
    try:
        from orchestrator.cli.commands import app

        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
