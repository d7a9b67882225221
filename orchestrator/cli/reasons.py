"""What people may give as a reason, for whoever reads of it."""

from __future__ import annotations

from orchestrator.cli.errors import CliError, Exit

REASON_MAX = 200
"""Characters; it is shown in one line, with all else that led to something."""


def require_reason(reason: str, *, may_be_empty: bool = False) -> None:
    """Refuse what can not be shown in a line.

    Raises:
        CliError: if it is none, too long, or has characters that are not printed.
    """
    if not reason.strip() and not may_be_empty:
        raise CliError(
            "--reason says nothing", "say in short why, for whoever reads of it", Exit.USAGE
        )
    if len(reason) > REASON_MAX or not reason.isprintable():
        raise CliError(
            f"--reason has {len(reason)} characters, expected at most {REASON_MAX} in one line",
            "say it in short; it is shown wherever what it is about is",
            Exit.USAGE,
        )
