"""`holdfast get`: lists of what there is, once or again and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import typer

from orchestrator.cli import runs
from orchestrator.cli.choices import Output
from orchestrator.cli.errors import unknown
from orchestrator.cli.follow import Follower
from orchestrator.cli.listing import EVENT_COLUMNS, KINDS, RUN, Events, run_rows
from orchestrator.cli.tables import Kind, rendered
from orchestrator.core.journal import JournalError

WATCH_EVERY_S = 1.0
CLEAR = "\x1b[H\x1b[2J\x1b[3J"


class Look(NamedTuple):
    """A list at one moment."""

    text: str
    over: bool = False
    """Whether it will not change any more."""
    damage: JournalError | None = None


def get(
    what: str, run: str | None, output: Output, *, watch: bool, tail: int, periodic: bool
) -> None:
    """Print a list; with `watch` whenever it changes, until the run is over.

    Raises:
        CliError: if there is no such kind or run.
        JournalError: if nothing of the journal can be trusted.
    """
    name = what if what.endswith("s") else f"{what}s"
    if name not in (*KINDS, "events", "devices"):
        raise unknown("kind", what, (*KINDS, "events", "devices"), "holdfast get")
    if name == "devices":
        from orchestrator.cli import devices

        shown = devices.shown(run)

        def look_at_devices() -> Look:
            nonlocal shown
            shown = devices.shown(run)
            return Look(shown.text(output))

        _show(look_at_devices, watch=watch)
        shown.require_whole()
        return
    if name == "runs" and run is None:
        _show(lambda: Look(rendered(RUN.name, RUN.columns, run_rows(), output)), watch=watch)
        return
    if name == "events":
        events = Events(tail or None, periodic=periodic)
        follower = Follower(runs.folder_of(run), events.take)
        kind = Kind("event", EVENT_COLUMNS, events.rows)
    else:
        follower = Follower(runs.folder_of(run))
        kind = KINDS[name]

    def look() -> Look:
        state, damage = runs.state_of(follower)
        text = rendered(kind.name, kind.columns, kind.rows(state, follower.folder), output)
        return Look(text, over=state.phase.final, damage=damage)

    _show(look, watch=watch)


def _show(look: Callable[[], Look], *, watch: bool) -> None:
    """Print what `look` returns; with `watch` again when it changes, until it says it is over."""
    clear = CLEAR if watch and sys.stdout.isatty() else ""
    shown = None
    while True:
        seen = look()
        if seen.text != shown:
            typer.echo(f"{clear}{seen.text}")
            shown = seen.text
        runs.require_whole(seen.damage)
        if seen.over or not watch:
            return
        time.sleep(WATCH_EVERY_S)
