"""Runs a sweep: one result file for each cell and seed, so that it can be resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec

from orchestrator import document
from orchestrator.cli import experimenting, units, whole
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


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One cell of the grid."""

    cell: int
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
    seeds = range(asked.first, asked.first + asked.seeds)
    wanted = {(cell.number, seed): Task(cell.settings, seed) for cell in cells for seed in seeds}
    found = _kept(out, wanted, rests_on)
    tasks = [task for key, task in wanted.items() if key not in found]
    if found:
        progress.write(f"{units.count(len(found), 'run')} of {len(wanted)} are there already\n")
    places = {(msgspec.json.encode(t.settings), t.seed): key for key, t in wanted.items()}
    with contextlib.closing(experimenting.results(tasks, jobs=jobs)) as coming:
        for result in coming if tasks else ():
            key = places[msgspec.json.encode(result.task.settings), result.task.seed]
            found[key] = result.outcome
            whole.write(_place(out, *key), _encoded(result, rests_on[key[0]]))
            experimenting.tell(progress, len(found), len(wanted), result)
            whole.write(
                out / RESULTS, msgspec.json.encode(results(asked.name, cells, found, len(wanted)))
            )
    told = results(asked.name, cells, found, len(wanted))
    whole.write(out / RESULTS, msgspec.json.encode(told))
    return told


def results(
    name: str, cells: Sequence[Cell], found: dict[tuple[int, int], Outcome], runs: int
) -> Results:
    """Return what the runs that are there come to, by cell; cells without any are left out."""
    rows = []
    for cell in cells:
        mine = [found[key] for key in sorted(found) if key[0] == cell.number]
        if mine:
            rows.append(
                Row(
                    cell=cell.number,
                    varied=cell.varied,
                    seeds=len(mine),
                    ettr=estimate([each.ettr for each in mine]),
                    throughput=estimate([each.throughput for each in mine]),
                    waited_s=sum(each.spares["waited_s"] for each in mine) / len(mine),
                    failed=sum(each.state == "Failed" for each in mine),
                )
            )
    return Results(sweep=name, interval=INTERVAL, runs=runs, done=len(found), rows=rows)


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


def _place(out: Path, cell: int, seed: int) -> Path:
    return out / f"cell-{cell:04d}-seed-{seed:05d}.json"


def _encoded(result: Result, rests_on: str) -> bytes:
    return msgspec.json.encode(
        Kept(settings=result.task.settings, rests_on=rests_on, outcome=result.outcome)
    )


def _kept(
    out: Path, wanted: dict[tuple[int, int], Task], rests_on: dict[int, str]
) -> dict[tuple[int, int], Outcome]:
    """Return the results that are there and of the very experiment that is asked for."""
    found = {}
    for key, task in wanted.items():
        file = _place(out, *key)
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
        same = (kept.settings, kept.rests_on) == (task.settings, rests_on[key[0]])
        if same and kept.outcome.seed == task.seed:
            found[key] = kept.outcome
    return found


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.2f}"
