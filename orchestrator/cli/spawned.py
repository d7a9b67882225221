"""Commands that need torch: programs of the trainer, started, since nobody imports the trainer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import msgspec
import typer

from orchestrator.cli.errors import CliError, Exit
from orchestrator.protocol.runfile import EMBEDDED, TrainingRun
from orchestrator.worlds import folder


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
    if importlib.util.find_spec("torch") is None:
        raise CliError(
            f"torch is not installed, and {module} needs it", "pip install 'holdfast[train]'"
        )
    # Like all processes of ours: what the user's folder has is not to stand in for our modules.
    command = [sys.executable, "-P", "-m", module, *arguments]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise typer.Exit(code if code > 0 else Exit.ERROR)


def require_weights(run: TrainingRun) -> None:
    """Refuse a run whose `initFrom` or `continueFrom` names nothing that its model can begin from.

    Ranks find that out by themselves, but only once everything has been started for them.

    Raises:
        typer.Exit: with the code for misuse; what is wrong has been said.
        CliError: if the trainer's libraries are not installed.
    """
    trainer = run.spec.trainer
    if trainer.entrypoint != EMBEDDED:
        return
    model, steps = msgspec.json.encode(trainer.model).decode(), str(trainer.steps)
    for field, address in (
        ("initFrom", trainer.init_from),
        ("continueFrom", trainer.continue_from),
    ):
        if address is not None:
            asked = ("--field", field, "--model", model, "--steps", steps)
            spawn("trainer.weights", "fit", address, *asked)


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
