"""`holdfast get`: lists of what there is, once or again and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import typer

from orchestrator.cli import runs
from orchestrator.cli.choices import Output
from orchestrator.cli.errors import unknown
from orchestrator.cli.follow import Follower
from orchestrator.cli.listing import EVENT_COLUMNS, KINDS, RUN, Events, run_rows
from orchestrator.cli.tables import Kind, rendered

WATCH_EVERY_S = 1.0
CLEAR = "\x1b[H\x1b[2J\x1b[3J"


def get(
    what: str, run: str | None, output: Output, *, watch: bool, tail: int, periodic: bool
) -> None:
    """Print a list; with `watch` whenever it changes, until the run is over.

    Raises:
        CliError: if there is no such kind or run.
        JournalError: if the journal is damaged.
    """
    name = what if what.endswith("s") else f"{what}s"
    if name not in (*KINDS, "events"):
        raise unknown("kind", what, (*KINDS, "events"), "holdfast get")
    if name == "runs" and run is None:
        _show(lambda: (rendered(RUN.name, RUN.columns, run_rows(), output), False), watch=watch)
        return
    if name == "events":
        events = Events(tail or None, periodic=periodic)
        follower = Follower(runs.folder_of(run), events.take)
        kind = Kind("event", EVENT_COLUMNS, events.rows)
    else:
        follower = Follower(runs.folder_of(run))
        kind = KINDS[name]

    def look() -> tuple[str, bool]:
        state = runs.state_of(follower)
        text = rendered(kind.name, kind.columns, kind.rows(state, follower.folder), output)
        return text, state.phase.final

    _show(look, watch=watch)


def _show(look: Callable[[], tuple[str, bool]], *, watch: bool) -> None:
    """Print what `look` returns; with `watch` again when it changes, until it says it is over."""
    text, over = look()
    if not watch:
        typer.echo(text)
        return
    clear = CLEAR if sys.stdout.isatty() else ""
    shown = None
    while True:
        if text != shown:
            typer.echo(f"{clear}{text}")
            shown = text
        if over:
            return
        time.sleep(WATCH_EVERY_S)
        text, over = look()
