"""Commands that need torch: programs of the trainer, started, since nobody imports the trainer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import msgspec
import typer

from orchestrator.cli.errors import CliError, Exit
from orchestrator.protocol.pinned import means
from orchestrator.protocol.runfile import EMBEDDED, Trainer, TrainingRun
from orchestrator.worlds import folder
from orchestrator.worlds.folder import RunFolder, home


def spawn(module: str, *arguments: str) -> None:
    """Run a program of the trainer in place of this command, to its end.

    It reads and writes what this command would, and says itself what is wrong.

    Args:
        module: of the trainer.
        arguments: what it is called with.

    Raises:
        CliError: if the trainer's libraries are not installed.
        typer.Exit: with its exit code, unless that is 0.
    """
    _ran(module, arguments, None)


def _ran(module: str, arguments: tuple[str, ...], stdout: int | None) -> bytes:
    if importlib.util.find_spec("torch") is None:
        raise CliError(
            f"torch is not installed, and {module} needs it", "pip install 'holdfast[train]'"
        )
    # Like all processes of ours: what the user's folder has is not to stand in for our modules.
    command = [sys.executable, "-P", "-m", module, *arguments]
    done = subprocess.run(command, check=False, stdout=stdout)
    if code := done.returncode:
        raise typer.Exit(code if code > 0 else Exit.ERROR)
    return done.stdout or b""


def pin_weights(run: TrainingRun, root: Path | None = None) -> TrainingRun:
    """Return the run with the checkpoint pinned that `initFrom` or `continueFrom` means now.

    A run that was begun already keeps what it began from: its checkpoints are marked with that.
    What its model can not begin from is refused. Ranks find that out by themselves, but only once
    everything has been started for them.

    Args:
        run: as it was written.
        root: folder of the run, or where it is going to be; None for its place in `home()`.

    Raises:
        typer.Exit: with the code for misuse; what is wrong has been said.
        CliError: if the trainer's libraries are not installed.
    """
    trainer = run.spec.trainer
    if trainer.entrypoint != EMBEDDED:
        return run
    before = _begun(RunFolder(root if root is not None else home() / run.metadata.name))
    model, steps = msgspec.json.encode(trainer.model).decode(), str(trainer.steps)
    pins: dict[str, str] = {}
    for field, name in (("initFrom", "init_from"), ("continueFrom", "continue_from")):
        address, known = getattr(trainer, name), getattr(before, name, None)
        if address is None:
            continue
        if known is not None and means(known, address):
            pins[name] = known
            continue
        asked = ("fit", "--field", field, "--model", model, "--steps", steps, "--", address)
        told = _ran("trainer.weights", asked, subprocess.PIPE)
        pins[name] = msgspec.json.decode(told, type=str)
    pinned = msgspec.structs.replace(trainer, **pins)
    return msgspec.structs.replace(run, spec=msgspec.structs.replace(run.spec, trainer=pinned))


def _begun(place: RunFolder) -> Trainer | None:
    """Return what the folder of a run says of its trainer; None if it was not begun."""
    try:
        data = place.run_file.read_bytes()
        return msgspec.json.decode(data, type=TrainingRun).spec.trainer
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None  # whoever prepares the folder says what is wrong with it


def source(address: str) -> str:
    """Return where weights are, given an address or the name of a run, with or without `@STEP`."""
    name, at, step = address.rpartition("@")
    run = name if at and step.isdecimal() else address
    if "://" in run or Path(run).exists():
        return address
    try:
        root = str(folder.find(run).root)
    except (FileNotFoundError, ValueError):  # ValueError: a null byte, which is no name
        return address  # who opens it says what is expected
    return f"{root}@{step}" if run == name else root
