"""Runs an experiment with many seeds, in several processes, and says how far it is."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import msgspec

from orchestrator.cli import pool, units, whole
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


def results(tasks: Sequence[Task], *, jobs: int) -> Generator[Result, None, None]:
    """Yield what comes of each task as it comes; one alone is done in this process."""
    if len(tasks) == 1:
        yield conduct(tasks[0])
        return
    with contextlib.closing(pool.each(conduct, tasks, jobs=jobs)) as found:
        yield from found


def run(settings: Settings, seeds: Sequence[int], *, jobs: int, progress: TextIO) -> list[Outcome]:
    """Run an experiment with some seeds, telling after each how far it is."""
    found: list[Outcome] = []
    tasks = [Task(settings, seed) for seed in seeds]
    with contextlib.closing(results(tasks, jobs=jobs)) as coming:
        for result in coming:
            found.append(result.outcome)
            if len(tasks) > 1:
                tell(progress, len(found), len(tasks), result)
    return found


def tell(progress: TextIO, done: int, of: int, result: Result) -> None:
    """Say in a line how far it is, and what came of the newest seed."""
    outcome = result.outcome
    progress.write(
        f"{done} of {units.count(of, 'run')}: seed {outcome.seed} has ETTR "
        f"{outcome.ettr * 100:.2f} %, in {units.seconds(outcome.wall_s)}\n"
    )
    progress.flush()


def conduct(task: Task) -> Result:
    """Run one seed."""
    return Result(task, experiment.conduct(_given(task.settings), task.seed))


def journaled(given: Inputs, seed: int, file: Path) -> Outcome:
    """Run one seed, and write its journal; the file is there once it is whole."""
    with whole.writing(file) as out:
        out.write(journal.line(journal.Header(run_id=f"simulated-{seed}", run=given.run_file())))

        def record(entry: journal.Entry) -> None:
            out.write(journal.line(entry))

        return experiment.conduct(given, seed, record)


def _given(settings: Settings) -> Inputs:
    return _read(msgspec.json.encode(settings))


@functools.lru_cache(maxsize=4)
def _read(settings: bytes) -> Inputs:
    # By text, since settings have lists in them: a worker reads its files once, not for each seed.
    return experiment.inputs(msgspec.json.decode(settings, type=Settings))
