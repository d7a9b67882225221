"""Makes or opens the folder of a run, and refuses one that is somebody else's."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

import msgspec

from orchestrator.agent.signals import BadTableError, read_table
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.follow import Follower
from orchestrator.core.state import RunState
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server.journal import AlreadyRunningError, lock
from orchestrator.worlds.devices import PROBES, address
from orchestrator.worlds.folder import RunFolder, elsewhere, home, next_former_journal
from orchestrator.worlds.lane import Lane
from storage.address import open_store
from storage.blob import BlobStore
from storage.commit import latest_commit
from storage.errors import StorageError, UnsupportedUriError

LEDGER = "spec.recovery.deviceLedger"
SIGNALS = "spec.detection.signals"
LEDGER_S = 5.0
"""For so long it is waited for to take a verdict."""
TOKEN_BYTES = 32
_TOKEN = re.compile(rb"[A-Za-z0-9_-]{43}")
"""What `_write` made of TOKEN_BYTES; an empty or cut token would let anybody in, or nobody."""


def prepare(run: TrainingRun, plan: FaultPlan | None, out: Path | None) -> tuple[RunFolder, int]:
    """Return the folder of a run, ready to be worked in, and the lock that is held on it.

    A run that did not end goes on where it was, with the run file that it has. One that was stopped
    or failed begins a new life that continues from its checkpoints, with a run file that may have
    been repaired; the old journal stays beside the new one.

    Raises:
        CliError: if the folder is in use, of another run, or the run has succeeded already.
        OSError: if the folder can not be made or written.
    """
    name = run.metadata.name
    folder = RunFolder(out if out is not None else home() / name)
    _require_ours(folder)
    _require_name_free(folder, name)
    folder.root.mkdir(parents=True, exist_ok=True)
    held = _lock(folder, name)
    try:
        over = _require_unfinished(folder, run, plan)
        _fill(folder, run, plan)
        _register(folder, name)
        if over:
            # Last: what is refused above leaves the former life to be looked at.
            _archive(folder)
    except BaseException:
        os.close(held)
        raise
    return folder, held


def _fill(folder: RunFolder, run: TrainingRun, plan: FaultPlan | None) -> None:
    """Put into the folder what the processes of the run are going to read."""
    # The last one, too: made by whoever asks first, it may not be ours to take requests from.
    for path in (folder.logs, folder.nodes, folder.requests):
        path.mkdir(exist_ok=True)
    if run.spec.checkpoint.uri is not None:
        _require_store(run.spec.checkpoint.uri, "spec.checkpoint.uri", "checkpoints")
    if run.spec.recovery.device_ledger is not None:
        _opened(run.spec.recovery.device_ledger, LEDGER)
    _keep_signals(folder, run.spec.detection.signals)
    _write(folder.run_file, msgspec.json.encode(run))
    if plan is None:
        folder.plan_file.unlink(missing_ok=True)
    else:
        _write(folder.plan_file, msgspec.json.encode(plan))
    if not _TOKEN.fullmatch(folder.token.read_bytes() if folder.token.exists() else b""):
        # Nobody who lives knows the old one: both locks are ours.
        _write(folder.token, secrets.token_urlsafe(TOKEN_BYTES).encode())
    folder.stop_request.unlink(missing_ok=True)
    for path in folder.requests.glob("*"):
        path.unlink()  # of a former life; its controllers are gone


def _keep_signals(folder: RunFolder, file: str | None) -> None:
    """Have agents find what is different in the table of signals, whatever becomes of the file."""
    if file is None:
        folder.signals.unlink(missing_ok=True)
        return
    try:
        read_table(Path(file))
        _write(folder.signals, Path(file).read_bytes())
    except BadTableError as error:
        raise CliError(f"{SIGNALS}: {error}", error.hint, Exit.USAGE) from error
    except OSError as error:
        hint = BadTableError.hint
        raise CliError(f"{SIGNALS}: {error.strerror}: {file}", hint, Exit.USAGE) from error


def _require_ours(folder: RunFolder) -> None:
    if not folder.root.exists():
        return
    if not folder.root.is_dir():
        raise CliError(
            f"not a folder: {folder.root}", "choose another place with --out", Exit.USAGE
        )
    # The lock is what is made first: a folder with no more than that is of a start that failed.
    marks = (folder.run_file, folder.journal, folder.supervisor_lock)
    if any(folder.root.iterdir()) and not any(path.exists() for path in marks):
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


def ledger_problem(run: TrainingRun, folder: RunFolder) -> str:
    """Say why the device ledger takes no verdict now, "" if it does: a run goes on without."""
    uri = address(run, folder)
    store = _opened(uri, LEDGER)
    found: list[str] = []

    def look() -> None:
        try:
            _probe(store, PROBES)
        except StorageError as error:
            found.append(str(error))
        else:
            found.append("")

    lane = Lane("holdfast-probe", LEDGER_S)
    lane.submit(look, lambda: None)
    lane.latest().wait()
    problem = found[0] if found else f"it did not answer within {LEDGER_S:g} s"
    if not problem:
        return ""
    return (
        f"warning: {LEDGER} takes no verdicts: {uri} ({problem}); they wait until it does, and "
        "nobody is kept out for what can not be read"
    )


def _opened(uri: str, field: str) -> BlobStore:
    try:
        return open_store(uri)
    except UnsupportedUriError as error:
        raise CliError(f"{field}: {error}", error.hint, Exit.USAGE) from error


def _probe(store: BlobStore, prefix: str) -> None:
    key = f"{prefix}{secrets.token_hex(8)}"
    store.put(key, b"")
    store.delete(key)


def _require_store(uri: str, field: str, what: str) -> None:
    """Refuse a store that takes nothing: when there is something for it, it is too late to say."""
    store = _opened(uri, field)
    try:
        _probe(store, "probe-")
    except StorageError as error:
        raise CliError(
            f"{field} takes no {what}: {uri} ({error})",
            f"choose a folder or bucket that can be written, with room. {error.hint}",
        ) from error


def _require_unfinished(folder: RunFolder, run: TrainingRun, plan: FaultPlan | None) -> bool:
    """Refuse a journal that this run can not go on from; return whether its life is over."""
    if not folder.journal.exists() or folder.journal.stat().st_size == 0:
        return False
    # Not from run.json: the journal says which run it is of, and says it with a checksum.
    state = Follower(folder).poll()
    if state is None:
        return False
    if state.run != run and not (state.phase.final and state.run.metadata == run.metadata):
        raise CliError(
            f"the folder is of a run with another run file "
            f"({', '.join(_differences(state.run, run))}): {folder.root}",
            "it can be changed once the run has ended (`holdfast stop`); or choose another folder "
            "with --out, or another metadata.name",
            Exit.USAGE,
        )
    if state.end_state == "Succeeded":
        raise CliError(
            f"run {run.metadata.name} has succeeded already: {folder.root}",
            "look at it with `holdfast report`, or run it anew with --out",
        )
    if state.phase.final:
        _require_commits(folder, state, run)
        return True
    if _planned(folder) != plan:
        raise CliError(
            f"the run goes on, and its fault plan was another one: {folder.root}",
            "give the same --faults as before, or start anew with --out",
            Exit.USAGE,
        )
    return False


def _require_commits(folder: RunFolder, state: RunState, run: TrainingRun) -> None:
    """Refuse to begin a life where what the former ones committed is gone, or goes too far.

    The controller would find out that it is gone, too, and end the run: one more life that comes
    to nothing.
    """
    newest = max((known.step for known in state.commits), default=0)
    if newest == 0:
        return
    if run.spec.trainer.steps < newest:
        raise CliError(
            f"spec.trainer.steps is {run.spec.trainer.steps}, and the run has committed step "
            f"{newest} already: {folder.root}",
            "raise spec.trainer.steps, or begin anew with --out",
            Exit.USAGE,
        )
    uri = run.spec.checkpoint.uri or str(folder.checkpoints)
    try:
        there = latest_commit(open_store(uri)) is not None
    except StorageError as error:
        raise CliError(
            f"spec.checkpoint.uri does not answer: {uri} ({error})", error.hint
        ) from error
    if not there:
        raise CliError(
            f"spec.checkpoint.uri has no checkpoint, and the run committed some, the newest of "
            f"step {newest}: {uri}",
            "is the volume mounted? bring it back, or begin anew with --out",
        )


def _planned(folder: RunFolder) -> FaultPlan | None:
    """Return the plan that the run was started with, None for none."""
    if not folder.plan_file.exists():
        return None
    try:
        return msgspec.json.decode(folder.plan_file.read_bytes(), type=FaultPlan)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CliError(
            f"the run goes on, and the fault plan it was started with is damaged: {error}: "
            f"{folder.plan_file}",
            "remove that file to go on without faults, or start anew with --out",
        ) from error


def _archive(folder: RunFolder) -> None:
    """Put the journal of a life that has ended aside; the next life counts its own time.

    The controller finds it there, and takes over what that life knew.
    """
    # The clock first: whatever comes in between, no life goes on by the clock of another.
    folder.clock.unlink(missing_ok=True)
    folder.snapshot.unlink(missing_ok=True)
    folder.journal.replace(next_former_journal(folder))


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


def _require_name_free(folder: RunFolder, name: str) -> None:
    """Refuse a name under which another run is known and alive."""
    home().mkdir(parents=True, exist_ok=True)
    for place in (elsewhere(name), home() / name):
        other = RunFolder(place.resolve())
        if other.root != folder.root.resolve() and other.supervisor_lock.exists():
            _require_unlocked(
                other.supervisor_lock, f"a run named {name} is running already: {other.root}"
            )


def _register(folder: RunFolder, name: str) -> None:
    """Make this run the one that is known by its name, instead of one that is over."""
    elsewhere(name).unlink(missing_ok=True)
    registered = home() / name
    if registered.resolve() == folder.root.resolve():
        return
    if registered.is_symlink():
        registered.unlink()
    # A folder of that name may hold all that is left of another run: it stays.
    link = elsewhere(name) if registered.exists() else registered
    link.symlink_to(folder.root)


def forget(folder: RunFolder, name: str) -> None:
    """Have a run that is over be known by its name no more; its folder is the caller's."""
    for link in (elsewhere(name), home() / name):
        if link.is_symlink() and link.resolve() == folder.root.resolve():
            link.unlink()


def _write(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, as a whole."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch(mode=0o600)
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
