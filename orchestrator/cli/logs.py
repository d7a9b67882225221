"""`holdfast logs`: what a rank printed, and goes on printing."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import typer

from orchestrator.cli import runs
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.follow import Follower
from orchestrator.core.journal import JournalError
from orchestrator.protocol.runfile import TrainingRun

LOOK_EVERY_S = 0.2
BLOCK_BYTES = 1 << 16


def logs(run: str | None, rank: int, *, follow: bool, tail: int | None) -> None:
    """Print the output of a rank; with `follow` also what comes, until the run is over.

    What a rank printed does not depend on the journal: a damaged one is told of at the end.

    Raises:
        CliError: if the run has no such rank, the rank has not printed anything, or the journal
            can not tell everything.
        JournalError: if nothing of the journal can be trusted.
        OSError: if the file can not be read.
    """
    follower = Follower(runs.folder_of(run))
    run_read, wrong = _run_of(follower)
    if not 0 <= rank < run_read.world_size:
        raise CliError(
            f"rank is {rank}, expected 0 to {run_read.world_size - 1}: {run_read.metadata.name}",
            "`holdfast get ranks` shows where they are",
            Exit.USAGE,
        )
    path = follower.folder.rank_log(rank)
    if not path.exists() and wrong is None and not follow:
        raise CliError(
            f"rank {rank} has not printed anything: {path}",
            "it prints once it has its seat; `-f` waits for it",
        )
    position = _printed_from(path, _tail_start(path, tail))
    if wrong is not None:
        raise wrong
    while follow:
        state, damage = runs.state_of(follower)
        position = _printed_from(path, position)
        runs.require_whole(damage)
        if state.phase.final:
            return
        time.sleep(LOOK_EVERY_S)


def _run_of(follower: Follower) -> tuple[TrainingRun, Exception | None]:
    """Return whose logs these are, and what is wrong with the journal that should tell."""
    try:
        state, damage = runs.state_of(follower)
    except (CliError, JournalError) as error:
        try:
            read = follower.folder.run_file.read_bytes()
            return msgspec.json.decode(read, type=TrainingRun), error
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            raise error from None
    return state.run, damage


def _printed_from(path: Path, position: int) -> int:
    """Print a file from `position` on; return where it ended."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return position
    with file:
        if file.seek(0, 2) < position:
            position = 0  # somebody emptied it: what is there now is new
        file.seek(position)
        while data := file.read(BLOCK_BYTES):
            typer.echo(data, nl=False)
        return file.tell()


def _tail_start(path: Path, lines: int | None) -> int:
    """Return where the last `lines` lines of a file begin, reading it from its end."""
    if lines is None or not path.exists():
        return 0
    with path.open("rb") as file:
        position = file.seek(0, 2)
        if lines == 0:
            return position
        # The newline at the very end belongs to the last line.
        wanted = lines + 1
        end = position
        while position > 0:
            start = max(position - BLOCK_BYTES, 0)
            file.seek(start)
            data = file.read(position - start)
            if position == end and not data.endswith(b"\n"):
                wanted -= 1
            if data.count(b"\n") >= wanted:
                for _ in range(wanted - 1):
                    data = data[: data.rindex(b"\n")]
                return start + data.rindex(b"\n") + 1
            wanted -= data.count(b"\n")
            position = start
    return 0
