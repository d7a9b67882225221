"""`holdfast stop`: asks the controller of a run to end it, and waits until it has."""

from __future__ import annotations

import contextlib
import getpass
import os
import time

from orchestrator.cli import runs, units
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.follow import Follower
from orchestrator.core.state import RunState
from orchestrator.worlds.folder import RunFolder

LOOK_EVERY_S = 0.1
NOBODY_S = 10.0
"""A controller that is gone for this long is not being started again by anybody."""


def stop(run: str | None, wait_s: float) -> str:
    """Ask for a run to be stopped; return how it ended.

    The request is taken back if nobody heeds it, so that it does not stop a later life of the run.

    Raises:
        CliError: if there is no such run, nobody runs it, or it did not end in time.
        JournalError: if its journal is damaged.
    """
    follower = Follower(runs.folder_of(run))
    state, damage = runs.state_of(follower)
    # Its end could not be read: to ask for it would be to wait for nothing.
    runs.require_whole(damage)
    name = state.run.metadata.name
    if state.phase.final:
        return f"{name} had already ended: {state.end_state}, {state.end_reason}"
    ask(follower.folder, f"{_user()} with `holdfast stop`")
    end = _await_end(follower, wait_s)
    return f"{name}: {end.end_state}, {end.end_reason}"


def _await_end(follower: Follower, wait_s: float) -> RunState:
    """Wait until the run is over, for as long as somebody seems to be running it."""
    began = seen = time.monotonic()
    while True:
        state, damage = runs.state_of(follower)
        runs.require_whole(damage)
        if state.phase.final:
            return state
        name = state.run.metadata.name
        now = time.monotonic()
        if runs.controller_pid(follower.folder) is not None:
            seen = now
        if now - seen > min(NOBODY_S, wait_s):
            follower.folder.stop_request.unlink(missing_ok=True)
            raise CliError(
                f"no controller is running: {name}, last heard of at {units.clock(state.now)}",
                "there is nothing to stop; `holdfast run` with the same file goes on with it",
            )
        if now - began > wait_s:
            raise CliError(
                f"{name} is {state.phase} {units.seconds(wait_s)} after it was asked to stop, "
                f"expected Stopped: {follower.folder.root}",
                "the request stands; look with `holdfast describe run`",
                Exit.TIMED_OUT,
            )
        time.sleep(LOOK_EVERY_S)


def ask(folder: RunFolder, by: str) -> None:
    """Ask for a run to be stopped. The request appears as a whole; an earlier one stands."""
    temporary = folder.root / f".stop-requested.{os.getpid()}"
    temporary.write_text(f"{by}\n", encoding="utf-8")
    try:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, folder.stop_request)
    finally:
        temporary.unlink()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return f"user {os.getuid()}"
