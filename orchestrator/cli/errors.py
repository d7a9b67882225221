"""What a user is told when something can not be done, and with which exit code.

One message, `what: expected, found: where`, and a hint. Whoever asked for JSON gets the same as an
object in the last line of standard error. A traceback is for our own mistakes only.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import itertools
import json
from collections.abc import Iterable, Sequence
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
        in_json = asks_for_json([*ctx._protected_args, *ctx.args])  # noqa: SLF001 - all that follows
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
            told = explanation(error) or (_misuse(error) if in_json else None)
            if told is None:
                raise
            message, hint, code = told
            # The terminal may be gone, and that is why we are here: the code tells as much.
            with contextlib.suppress(OSError):
                if in_json:
                    typer.echo(_as_json(error, message, hint, code), err=True)
                else:
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


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Return whether a command was to answer in JSON, whatever else is wrong with its arguments."""
    options = list(itertools.takewhile(lambda word: word != "--", arguments))
    pairs = itertools.pairwise([*options, ""])
    return any(
        (one in ("-o", "--output") and following == "json") or one in ("-ojson", "--output=json")
        for one, following in pairs
    )


def _misuse(error: Exception) -> tuple[str, str, Exit] | None:
    """Return what is wrong with the arguments of a command, for which the library has the words."""
    worded = getattr(error, "format_message", None)
    if worded is None:
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "holdfast"
    return worded(), f"`{command} --help` lists what there is", Exit.USAGE


def _as_json(error: Exception, message: str, hint: str, code: Exit) -> str:
    """Return an error in one line: whoever reads standard output finds nothing, or an answer."""
    kind = type(error).__name__
    told = {"kind": kind, "message": message, "hint": hint, "exit_code": int(code)}
    return json.dumps({"error": told})
