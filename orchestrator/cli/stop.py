"""`holdfast stop`: asks the controller of a run to end it, and waits until it has.

A run whose controller and command were killed has agents that train on; those are ended.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import time

from orchestrator.cli import runs, units
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.follow import Follower
from orchestrator.core.journal import JournalError
from orchestrator.core.state import RunState
from orchestrator.server.journal import AlreadyRunningError, lock
from orchestrator.worlds import born
from orchestrator.worlds.folder import RunFolder
from orchestrator.worlds.machine import node_names
from orchestrator.worlds.memory import sweep

LOOK_EVERY_S = 0.1
NOBODY_S = 10.0
"""A controller that is gone for this long is not being started again by anybody."""


def stop(run: str | None, wait_s: float) -> str:
    """Ask for a run to be stopped; return how it ended.

    Where nobody decides any more, agents may train on: then it is them that are ended. The request
    is taken back if nobody heeds it, so that it does not stop a later life of the run.

    Raises:
        CliError: if there is no such run, nothing of it is left, or it did not end in time.
        JournalError: if nothing of its journal can be trusted.
    """
    follower = Follower(runs.folder_of(run))
    state, damage = runs.state_of(follower)
    name = state.run.metadata.name
    if state.phase.final:
        return f"{name} had already ended: {state.end_state}, {state.end_reason}"
    if damage is not None and runs.controller_pid(follower.folder) is not None:
        # Its end could not be read: to ask for it would be to wait for nothing.
        runs.require_whole(damage)
    ask(follower.folder, f"{user()} with `holdfast stop`")
    return _await_end(follower, wait_s)


def _await_end(follower: Follower, wait_s: float) -> str:
    """Wait until the run is over, for as long as somebody seems to be running it."""
    began = seen = time.monotonic()
    while True:
        state, damage = runs.state_of(follower)
        name = state.run.metadata.name
        if state.phase.final:
            return f"{name}: {state.end_state}, {state.end_reason}"
        now = time.monotonic()
        if runs.controller_pid(follower.folder) is not None:
            seen = now
        if now - seen > min(NOBODY_S, wait_s):
            follower.folder.stop_request.unlink(missing_ok=True)
            return _end_agents(follower.folder, state, damage)
        if now - began > wait_s:
            raise CliError(
                f"{name} is {state.phase} {units.seconds(wait_s)} after it was asked to stop, "
                f"expected Stopped: {follower.folder.root}",
                "the request stands; look with `holdfast describe run`",
                Exit.TIMED_OUT,
            )
        time.sleep(LOOK_EVERY_S)


def _end_agents(folder: RunFolder, state: RunState, damage: JournalError | None) -> str:
    """End the agents of a run that nobody looks after; return what was done, in words."""
    name = state.run.metadata.name
    with contextlib.ExitStack() as held:
        try:
            for path in (folder.supervisor_lock, folder.controller_lock):
                held.callback(os.close, lock(path))
        except AlreadyRunningError as error:
            raise CliError(
                f"{name} has a controller or a `holdfast run` that does not answer: {error}",
                "is it stopped (state T)? end that process, then stop the run again",
            ) from error
        agents = born.living(folder, node_names(state.run))
        left = {agent.node for agent in born.end(agents, state.timeouts)}
        sweep()
    told = f"no controller is running: {name}, last heard of at {units.clock(state.now)}"
    if damage is not None:
        told += f"; {damage}"
    if not agents:
        raise CliError(
            told, "there is nothing to stop; `holdfast run` with the same file goes on with it"
        )
    words = ", ".join(
        f"{agent.node} (process {agent.pid}{', survived SIGKILL' * (agent.node in left)})"
        for agent in agents
    )
    if left:
        raise CliError(f"{told}; ended the agents that trained on: {words}", "reboot that machine")
    return (
        f"{told}; ended the agents that trained on: {words}\n"
        "`holdfast run` with the same file goes on from the newest checkpoint"
    )


def ask(folder: RunFolder, by: str) -> None:
    """Ask for a run to be stopped. The request appears as a whole; an earlier one stands."""
    temporary = folder.root / f".stop-requested.{os.getpid()}"
    temporary.write_text(f"{by}\n", encoding="utf-8")
    try:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, folder.stop_request)
    finally:
        temporary.unlink()


def user() -> str:
    """Return who asks, in words."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return f"user {os.getuid()}"
