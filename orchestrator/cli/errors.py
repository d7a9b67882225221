"""What a user is told when something can not be done, and with which exit code.

One message, `what: expected, found: where`, and a hint. A traceback is for our own mistakes only.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import typer
from typer.core import TyperGroup


class Exit(IntEnum):
    """Exit codes, the same for every command."""

    OK = 0
    ERROR = 1
    USAGE = 2
    """Bad usage or a bad file."""
    RUN_FAILED = 3
    TIMED_OUT = 4
    DAMAGED = 6
    """Bytes that were verified are not what was saved."""
    INTERRUPTED = 130


class CliError(Exception):
    """A command can not do what it was asked.

    Attributes:
        hint: what to do about it.
        code: exit code.
    """

    def __init__(self, message: str, hint: str, code: Exit = Exit.ERROR) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code

    def __reduce__(self) -> tuple[type[CliError], tuple[str, str, Exit]]:
        """Have another process raise it here as it was."""
        return type(self), (str(self), self.hint, self.code)


def unknown(what: str, found: str, known: Iterable[str], where: str) -> CliError:
    """Return the error for a name that is not there, with the nearest one that is."""
    names = sorted(known)
    near = difflib.get_close_matches(found, names, 1, 0.4)
    if near:
        hint = f"did you mean `{near[0]}`?"
    elif names:
        hint = f"there are: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    else:
        hint = f"there are no {what}s"
    return CliError(f"no {what} {found!r}: {where}", hint, Exit.USAGE)


_ADVICE = {
    errno.ENOSPC: "make room, or choose another folder",
    errno.EDQUOT: "make room, or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EMFILE: "raise the limit of open files: `ulimit -n`",
}


_DAMAGE = {
    "ShardCorruptError",
    "ManifestCorruptError",
    "BlobCorruptError",
    "BlobTooLargeError",
    "ForeignFormatError",
}


class Commands(TyperGroup):
    """A group of commands that tells its users what is wrong instead of how it failed."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - the library's own signature
        """Run a command; turn what a user can do something about into a message and a code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(Exit.INTERRUPTED) from None
        except typer.Abort as aborted:
            # A question was not answered: by an interrupt, or since nothing more comes.
            if isinstance(aborted.__context__, KeyboardInterrupt):
                raise typer.Exit(Exit.INTERRUPTED) from None
            raise
        except BrokenPipeError:
            raise  # the library ends quietly when the reader of a pipe is gone
        except Exception as error:
            told = explanation(error)
            if told is None:
                raise
            message, hint, code = told
            # The terminal may be gone, and that is why we are here: the code tells as much.
            with contextlib.suppress(OSError):
                typer.echo(message, err=True)
                typer.echo(f"hint: {hint}", err=True)
            raise typer.Exit(code) from None


def explanation(error: Exception) -> tuple[str, str, Exit] | None:
    """Return message, hint and exit code of an error that is not our own mistake; else None."""
    hint = getattr(error, "hint", "")
    if isinstance(error, CliError):
        return str(error), hint, error.code
    # By name: importing what raises them would load the whole core for `--help`.
    if type(error).__name__ in ("BadFileError", "PlanError", "ModelError", "SettingsError"):
        return str(error), hint, Exit.USAGE
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        advice = _ADVICE.get(error.errno or 0, "check the path and its permissions")
        return f"{error.strerror}{where}", hint or advice, Exit.ERROR
    if type(error).__name__ in _DAMAGE:
        return str(error), hint, Exit.DAMAGED
    if hint:
        return str(error), hint, Exit.ERROR
    return None
