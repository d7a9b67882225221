"""Finds runs: by name, by folder, or the newest one."""

from __future__ import annotations

from pathlib import Path

import msgspec

from orchestrator.cli.errors import CliError, unknown
from orchestrator.cli.follow import Follower
from orchestrator.core.journal import JournalError, JournalVersionError
from orchestrator.core.state import RunState
from orchestrator.protocol.agent import ControllerAddress
from orchestrator.worlds.folder import RunFolder, find, home


def folders() -> list[RunFolder]:
    """Return the folders of all runs in the home folder, the one written to last first."""
    root = home()
    if not root.exists():
        return []
    found: list[tuple[float, str, RunFolder]] = []
    for entry in root.iterdir():
        folder = RunFolder(entry.resolve())
        try:
            found.append((folder.journal.stat().st_mtime, entry.name, folder))
        except OSError:
            continue  # no run, or the link of one whose folder was moved away
    return [folder for _, _, folder in sorted(found, key=lambda f: (-f[0], f[1]))]


def folder_of(name: str | None) -> RunFolder:
    """Return the folder of a run, given its name or folder; the newest run for None.

    Raises:
        CliError: if there is no such run.
    """
    if name is None:
        newest = folders()
        if not newest:
            raise CliError(
                f"no runs: {home()}", "start one with `holdfast run RUN.yaml`, or give --run FOLDER"
            )
        return newest[0]
    try:
        return find(name)
    except FileNotFoundError:
        if Path(name).is_dir():
            raise CliError(
                f"no journal in this folder: {name}", "give the folder that `--out` named"
            ) from None
        there = [entry.name for entry in home().iterdir()] if home().exists() else []
        known = [name for name in there if not name.startswith("@")]  # what is of all runs
        raise unknown("run", name, known, str(home())) from None


def state_of(follower: Follower) -> tuple[RunState, JournalError | None]:
    """Return the state after reading all that can be trusted, and what is wrong behind that.

    Raises:
        CliError: if there is nothing to read.
        JournalError: if the journal can not be trusted from its first line on, or is of another
            version.
    """
    damage = None
    try:
        follower.poll()
    except JournalVersionError:
        raise
    except JournalError as error:
        if follower.state is None:
            raise
        damage = error
    state = follower.state
    if state is None:
        why = follower.torn or "it is empty"
        raise CliError(
            f"no header in the journal, {why}: {follower.folder.journal}",
            "the run ended before it began; start it again",
        )
    return state, damage


def require_whole(damage: JournalError | None) -> None:
    """Say, once all that can be told was told, that there is more. Raises CliError then."""
    if damage is not None:
        raise CliError(f"{damage}; what the lines before it tell is all that is shown", damage.hint)


def controller_pid(folder: RunFolder) -> int | None:
    """Return the process of the run's controller, None if none lives.

    A number alone may have been given to another process since; its command line tells. The
    controller's lock is not tried: holding it for a moment could turn a new controller away.
    """
    try:
        address = msgspec.json.decode(folder.address.read_bytes(), type=ControllerAddress)
        command = Path(f"/proc/{address.pid}/cmdline").read_bytes()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return address.pid if b"orchestrator.server" in command.split(b"\0") else None
