"""Runs an experiment with many seeds, in several processes, and says how far it is."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple, TextIO

import msgspec

from orchestrator.cli import elapsing, pool, units, whole
from orchestrator.cli.elapsing import Board, Writing
from orchestrator.core import journal
from orchestrator.simulation import experiment
from orchestrator.simulation.experiment import Inputs, Outcome
from orchestrator.simulation.settings import Settings


class Task(NamedTuple):
    """One seed of one experiment."""

    settings: Settings
    seed: int


class Result(NamedTuple):
    """What came of it."""

    task: Task
    outcome: Outcome


_BOARD: ContextVar[Board | None] = ContextVar("board", default=None)
"""Where this process writes down how far its runs are."""


def results(
    tasks: Sequence[Task], *, jobs: int, board: Board | None = None
) -> Generator[Result, None, None]:
    """Yield what comes of each task as it comes; one alone is done in this process.

    Args:
        tasks: what is to be done.
        jobs: processes at a time.
        board: takes which moment each of the tasks has reached meanwhile.
    """
    numbered = list(enumerate(tasks))
    if len(numbered) == 1:
        _write_to(board)
        yield _conduct(numbered[0])
        return
    begin = functools.partial(_write_to, board)
    with contextlib.closing(pool.each(_conduct, numbered, jobs=jobs, begin=begin)) as found:
        yield from found


def run(settings: Settings, seeds: Sequence[int], *, jobs: int, progress: TextIO) -> list[Outcome]:
    """Run an experiment with some seeds, telling after each how far it is."""
    found: list[Outcome] = []
    tasks = [Task(settings, seed) for seed in seeds]
    with (
        elapsing.shown(progress, [settings.horizon_s] * len(tasks)) as display,
        contextlib.closing(results(tasks, jobs=jobs, board=display.board)) as coming,
    ):
        for result in coming:
            found.append(result.outcome)
            if len(tasks) > 1:
                display.say(line(len(found), len(tasks), result.outcome))
    return found


def line(done: int, of: int, outcome: Outcome) -> str:
    """Return in a line how far it is, and what came of the newest seed."""
    return (
        f"{done} of {units.count(of, 'run')}: seed {outcome.seed} has ETTR "
        f"{outcome.ettr * 100:.2f} %, in {units.seconds(outcome.wall_s)}"
    )


def journaled(given: Inputs, seed: int, file: Path, *, progress: TextIO) -> Outcome:
    """Run one seed, and write its journal; the file is there once it is whole."""
    with (
        whole.writing(file) as out,
        elapsing.shown(progress, [given.settings.horizon_s]) as display,
    ):
        out.write(journal.line(journal.Header(run_id=f"simulated-{seed}", run=given.run_file())))

        def record(entry: journal.Entry) -> None:
            out.write(journal.line(entry))

        return experiment.conduct(given, seed, record, _writing(display.board, 0))


def _write_to(board: Board | None) -> None:
    _BOARD.set(board)


def _conduct(numbered: tuple[int, Task]) -> Result:
    """Run one seed."""
    (number, task), board = numbered, _BOARD.get()
    outcome = experiment.conduct(_given(task.settings), task.seed, checkers=_writing(board, number))
    if board is not None:
        # One that was given up has no more days to go.
        board[number] = task.settings.horizon_s
    return Result(task, outcome)


def _writing(board: Board | None, number: int) -> list[Writing]:
    return [] if board is None else [Writing(board, number)]


def _given(settings: Settings) -> Inputs:
    return _read(msgspec.json.encode(settings))


@functools.lru_cache(maxsize=4)
def _read(settings: bytes) -> Inputs:
    # By text, since settings have lists in them: a worker reads its files once, not for each seed.
    return experiment.inputs(msgspec.json.decode(settings, type=Settings))
