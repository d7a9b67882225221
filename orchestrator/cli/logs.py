"""`holdfast logs`: what a rank printed, and goes on printing."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from orchestrator.cli import runs
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.follow import Follower

LOOK_EVERY_S = 0.2
BLOCK_BYTES = 1 << 16


def logs(run: str | None, rank: int, *, follow: bool, tail: int | None) -> None:
    """Print the output of a rank; with `follow` also what comes, until the run is over.

    Raises:
        CliError: if the run has no such rank, or the rank has not printed anything.
        JournalError: if the journal is damaged.
        OSError: if the file can not be read.
    """
    follower = Follower(runs.folder_of(run))
    state = runs.state_of(follower)
    if not 0 <= rank < state.run.world_size:
        raise CliError(
            f"rank is {rank}, expected 0 to {state.run.world_size - 1}: {state.run.metadata.name}",
            "`holdfast get ranks` shows where they are",
            Exit.USAGE,
        )
    path = follower.folder.rank_log(rank)
    if not path.exists() and not follow:
        raise CliError(
            f"rank {rank} has not printed anything: {path}",
            "it prints once it has its seat; `-f` waits for it",
        )
    position = _printed_from(path, _tail_start(path, tail))
    while follow:
        over = state.phase.final
        position = _printed_from(path, position)
        if over:
            return
        time.sleep(LOOK_EVERY_S)
        state = runs.state_of(follower)


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
