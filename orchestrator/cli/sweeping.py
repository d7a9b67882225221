"""Runs a sweep: one result file for each experiment and seed, so that it can be resumed.

A file is named by what was asked and not by its place in the grid, so that a grid with more values,
or in another order, goes on with what is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import msgspec
import xxhash

from orchestrator import document
from orchestrator.cli import elapsing, experimenting, units, whole
from orchestrator.cli.choices import Told
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.experimenting import Result, Task
from orchestrator.cli.tables import grid, in_json, in_yaml
from orchestrator.simulation import experiment, sweep
from orchestrator.simulation.experiment import Outcome
from orchestrator.simulation.settings import Settings
from orchestrator.simulation.summary import INTERVAL, Estimate, estimate
from orchestrator.simulation.sweep import Cell

RESULTS = "results.json"


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A result file: what was asked, and what came of it."""

    settings: Settings
    rests_on: str
    """Digest of the model, record and profile that the settings name, as they were."""
    outcome: Outcome


class Key(NamedTuple):
    """What tells one result from all others, in this grid and in any other."""

    experiment: str
    """Digest of all settings, those of `base` and the default ones too, and what they rest on."""
    seed: int

    @property
    def file(self) -> str:
        """Name of the file with the result."""
        return f"run-{self.experiment}-seed-{self.seed:05d}.json"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One cell of the grid."""

    cell: int
    experiment: str
    """Of the names of its result files: run-EXPERIMENT-seed-00000.json."""
    varied: dict[str, Any]
    seeds: int
    ettr: Estimate
    throughput: Estimate
    waited_s: float
    failed: int


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep came to, or as much of it as there is."""

    sweep: str
    interval: str
    runs: int
    """That it has in all."""
    done: int
    rows: list[Row]


def run(file: Path, out: Path, *, jobs: int, progress: TextIO) -> Results:
    """Run what a sweep still lacks; its results lie in a folder, each whole or not there.

    Raises:
        BadFileError, SettingsError, ModelError: before anything is run, if a cell can not be.
        CliError: if the folder has a file that is no result.
    """
    asked, cells = sweep.parse(document.read(file), str(file))
    rests_on = {cell.number: experiment.inputs(cell.settings).digest() for cell in cells}
    out.mkdir(parents=True, exist_ok=True)
    names = {cell.number: name(cell.settings, rests_on[cell.number]) for cell in cells}
    wanted = {
        Key(names[cell.number], seed): _Wanted(Task(cell.settings, seed), rests_on[cell.number])
        for cell in cells
        for seed in range(asked.first, asked.first + asked.seeds)
    }
    found = _kept(out, wanted)

    def told() -> Results:
        rows = _rows(cells, names, found)
        return Results(
            sweep=asked.name, interval=INTERVAL, runs=len(wanted), done=len(found), rows=rows
        )

    tasks = [each.task for key, each in wanted.items() if key not in found]
    if found:
        progress.write(f"{units.count(len(found), 'run')} of {len(wanted)} are there already\n")
    keys = {(msgspec.json.encode(e.task.settings), e.task.seed): key for key, e in wanted.items()}
    with (
        elapsing.shown(progress, [task.settings.horizon_s for task in tasks]) as display,
        contextlib.closing(experimenting.results(tasks, jobs=jobs, board=display.board)) as coming,
    ):
        for result in coming:
            key = keys[msgspec.json.encode(result.task.settings), result.task.seed]
            found[key] = result.outcome
            whole.write(out / key.file, _encoded(result, wanted[key].rests_on))
            display.say(experimenting.line(len(found), len(wanted), result.outcome))
            whole.write(out / RESULTS, msgspec.json.encode(told()))
    results = told()
    whole.write(out / RESULTS, msgspec.json.encode(results))
    return results


def name(settings: Settings, rests_on: str) -> str:
    """Return what an experiment is called among results: a digest of all there is to say of it."""
    # Sorted: rates by class may come in any order, and mean the same.
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode((settings, rests_on), order="sorted"))


def _rows(cells: Sequence[Cell], names: dict[int, str], found: dict[Key, Outcome]) -> list[Row]:
    """Return what the runs that are there come to, by cell; cells without any are left out."""
    rows = []
    for cell in cells:
        mine = [found[key] for key in sorted(found) if key.experiment == names[cell.number]]
        if mine:
            rows.append(
                Row(
                    cell=cell.number,
                    experiment=names[cell.number],
                    varied=cell.varied,
                    seeds=len(mine),
                    ettr=estimate([each.ettr for each in mine]),
                    throughput=estimate([each.throughput for each in mine]),
                    waited_s=sum(each.spares["waited_s"] for each in mine) / len(mine),
                    failed=sum(each.state == "Failed" for each in mine),
                )
            )
    return rows


def shown(told: Results, form: Told) -> str:
    """Return what a sweep came to in the asked form."""
    match form:
        case Told.JSON:
            return in_json(told)
        case Told.YAML:
            return in_yaml(told)
        case Told.TEXT:
            names = list(told.rows[0].varied) if told.rows else []
            titles = [*names, "SEEDS", "ETTR (%)", "LOW", "HIGH", "WAITED (h)", "GAVE UP"]
            rows = [
                [
                    *(units.printable(value_words(row.varied[name])) for name in names),
                    str(row.seeds),
                    *map(_percent, (row.ettr.mean, row.ettr.low, row.ettr.high)),
                    f"{row.waited_s / 3600:.2f}",
                    str(row.failed),
                ]
                for row in told.rows
            ]
            head = f"sweep {told.sweep}: {told.done} of {units.count(told.runs, 'run')}; "
            return "\n".join([f"{head}{told.interval}", "", grid(titles, rows)])


def value_words(value: object) -> str:
    """Return the value of a setting as files have it."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


class _Wanted(NamedTuple):
    """A result that the grid asks for."""

    task: Task
    rests_on: str


def _encoded(result: Result, rests_on: str) -> bytes:
    return msgspec.json.encode(
        Kept(settings=result.task.settings, rests_on=rests_on, outcome=result.outcome)
    )


def _kept(out: Path, wanted: dict[Key, _Wanted]) -> dict[Key, Outcome]:
    """Return the results that are there and of the very experiment that is asked for."""
    found = {}
    for key, asked in wanted.items():
        file = out / key.file
        if not file.exists():
            continue
        try:
            kept = msgspec.json.decode(file.read_bytes(), type=Kept)
        except msgspec.DecodeError as error:
            raise CliError(
                f"not the result of a run: {error}: {file}",
                "remove it to have it run again, or choose another --out",
                Exit.USAGE,
            ) from error
        # A name is easily given to another file, and what is in it counts.
        same = (kept.settings, kept.rests_on) == (asked.task.settings, asked.rests_on)
        if same and kept.outcome.seed == key.seed:
            found[key] = kept.outcome
    return found


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.2f}"
