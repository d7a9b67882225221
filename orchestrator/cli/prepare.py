"""Makes or opens the folder of a run, and refuses one that is somebody else's."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec

from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.follow import Follower
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server.journal import AlreadyRunningError, lock
from orchestrator.worlds.folder import RunFolder, home

TOKEN_BYTES = 32


def prepare(run: TrainingRun, plan: FaultPlan | None, out: Path | None) -> tuple[RunFolder, int]:
    """Return the folder of a run, ready to be worked in, and the lock that is held on it.

    A run that did not end goes on where it was; one that was stopped or failed begins a new life
    that continues from its checkpoints; the old journal stays beside the new one.

    Raises:
        CliError: if the folder is in use, of another run, or the run has succeeded already.
        OSError: if the folder can not be made or written.
    """
    name = run.metadata.name
    registered = home() / name
    folder = RunFolder(out if out is not None else registered)
    _require_ours(folder)
    for path in (folder.root, folder.logs, folder.nodes):
        path.mkdir(parents=True, exist_ok=True)
    held = _lock(folder, name)
    _open_journal(folder, run, plan)
    _write(folder.run_file, msgspec.json.encode(run))
    if plan is None:
        folder.plan_file.unlink(missing_ok=True)
    else:
        _write(folder.plan_file, msgspec.json.encode(plan))
    if not folder.token.exists():
        _write(folder.token, secrets.token_urlsafe(TOKEN_BYTES).encode())
    folder.stop_request.unlink(missing_ok=True)
    if out is not None:
        _register(registered, folder, name)
    return folder, held


def _require_ours(folder: RunFolder) -> None:
    if not folder.root.exists():
        return
    if not folder.root.is_dir():
        raise CliError(
            f"not a folder: {folder.root}", "choose another place with --out", Exit.USAGE
        )
    if any(folder.root.iterdir()) and not folder.run_file.exists():
        raise CliError(
            f"the folder has files and is not that of a run: {folder.root}",
            "choose an empty or new folder with --out",
            Exit.USAGE,
        )


def _lock(folder: RunFolder, name: str) -> int:
    try:
        held = lock(folder.supervisor_lock)
    except AlreadyRunningError as error:
        raise CliError(f"run {name} is running already: {folder.root}", error.hint) from error
    # A controller may have outlived the command that started it.
    _require_unlocked(
        folder.controller_lock,
        f"run {name} has a controller that no `holdfast run` looks after: {folder.root}",
    )
    return held


def _require_unlocked(path: Path, message: str) -> None:
    try:
        os.close(lock(path))
    except AlreadyRunningError as error:
        raise CliError(message, error.hint) from error


def _open_journal(folder: RunFolder, run: TrainingRun, plan: FaultPlan | None) -> None:
    if not folder.journal.exists() or folder.journal.stat().st_size == 0:
        return
    before = msgspec.json.decode(folder.run_file.read_bytes(), type=TrainingRun)
    if before != run:
        raise CliError(
            f"the folder is of a run with another run file "
            f"({', '.join(_differences(before, run))}): {folder.root}",
            "choose another folder with --out, or another metadata.name",
            Exit.USAGE,
        )
    state = Follower(folder).poll()
    if state is None:
        return
    if state.end_state == "Succeeded":
        raise CliError(
            f"run {run.metadata.name} has succeeded already: {folder.root}",
            "look at it with `holdfast report`, or run it anew with --out",
        )
    if state.phase.final:
        _archive(folder)
        return
    planned = folder.plan_file.read_bytes() if folder.plan_file.exists() else b""
    if planned != (b"" if plan is None else msgspec.json.encode(plan)):
        raise CliError(
            f"the run goes on, and its fault plan was another one: {folder.root}",
            "give the same --faults as before, or start anew with --out",
            Exit.USAGE,
        )


def _archive(folder: RunFolder) -> None:
    """Put the journal of a life that has ended aside; the next life counts its own time."""
    number = 1
    while (target := folder.root / f"journal.{number}").exists():
        number += 1
    folder.journal.replace(target)
    folder.clock.unlink(missing_ok=True)


def _differences(before: TrainingRun, now: TrainingRun) -> list[str]:
    old, new = (dict(_leaves(msgspec.to_builtins(run))) for run in (before, now))
    return [
        f"{field} was {old.get(field)!r}, is {new.get(field)!r}"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    ][:4]


def _leaves(data: object, path: str = "") -> list[tuple[str, object]]:
    if not isinstance(data, dict):
        return [(path, data)]
    return [
        leaf
        for key, value in data.items()
        for leaf in _leaves(value, f"{path}.{key}" if path else str(key))
    ]


def _register(registered: Path, folder: RunFolder, name: str) -> None:
    """Make a run that lies elsewhere known by its name; a run that is alive keeps the name."""
    if registered.resolve() == folder.root.resolve():
        return
    registered.parent.mkdir(parents=True, exist_ok=True)
    if registered.exists():
        other = RunFolder(registered.resolve())
        if other.supervisor_lock.exists():
            _require_unlocked(
                other.supervisor_lock, f"a run named {name} is running already: {other.root}"
            )
    if registered.is_symlink():
        registered.unlink()
    if not registered.exists():
        registered.symlink_to(folder.root)


def _write(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, as a whole."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600)
    temporary.write_bytes(data)
    temporary.replace(path)
