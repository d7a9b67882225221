"""Runs a campaign: trials, steps without faults, overhead; each result is kept as soon as it is.

One file has all that is known, and is replaced as a whole: a campaign that is interrupted goes on
with the first trial that it lacks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, TextIO, get_args

import msgspec

from orchestrator.campaign import catalogue, job, timed
from orchestrator.campaign.calm import Calm
from orchestrator.campaign.catalogue import Trial
from orchestrator.campaign.conduct import SNAPSHOTS, Conductor
from orchestrator.campaign.costs import cost
from orchestrator.campaign.judging import Result
from orchestrator.campaign.summary import Campaign, Clean, Resized, campaign
from orchestrator.cli import campaign_resizes, campaign_runs, intake, units, whole
from orchestrator.cli.errors import CliError, Exit
from orchestrator.protocol.fitting import EMBEDDED
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server.journal import AlreadyRunningError, lock

Kind = Literal["corruption", "hang", "straggler"]
CORRUPTION: Kind = "corruption"
KINDS: tuple[Kind, ...] = get_args(Kind)
KEPT, ROOM, LOCK = "campaign.json", "room", "campaign.lock"
"""In a campaign's folder: what is known, what trials leave while it is under way, and its lock."""
Count = Annotated[int, msgspec.Meta(ge=0)]
Time = Annotated[float, msgspec.Meta(gt=0)]
CLEAN_AT_ONCE = 100
"""Steps without a fault between two saves of what is known."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a campaign is to be."""

    trials: int
    seed: int
    clean_steps: int
    pairs: int
    whole_runs: bool
    classes: tuple[Kind, ...] = (CORRUPTION,)
    resizes: int = 0


class Kept(msgspec.Struct, kw_only=True):
    """What is known of a campaign so far."""

    seed: int
    trials: int
    whole_runs: bool
    classes: tuple[Kind, ...] = (CORRUPTION,)
    run: TrainingRun
    results: list[Result] = []
    alarms: list[str] = []
    clean_steps: Count = 0
    false_triggers: Count = 0
    pairs: list[tuple[Time, Time]] = []
    resizes: list[Resized] = []


def run(run_file: Path | None, asked: Asked, out: Path, *, progress: TextIO) -> Campaign:
    """Do what a campaign still lacks; return what it comes to.

    Args:
        run_file: the run to strike; None for the small one that comes with holdfast.
        asked: what it is to be.
        out: its folder, made if it is not there.
        progress: hears of every result in a line.

    Raises:
        BadFileError: if the run file is no run.
        CliError: if the run is not marked for it, or the folder has another campaign, or one that
            is under way.
        WorldBrokenError: if the world breaks without a fault in it.
    """
    target = job.small() if run_file is None else _own(run_file)
    out.mkdir(parents=True, exist_ok=True)
    file = out / KEPT
    with _room(out) as room:
        work = _Work(_kept(file, asked, target), file, progress)
        try:
            work.strike(room / "trials")
            if CORRUPTION in asked.classes:
                work.rest(asked.clean_steps, room / "clean")
                work.weigh(asked.pairs, room / "costs")
                work.resize(asked.resizes, room / "resizes")
            work.run_whole(room / "runs")
        except KeyboardInterrupt:
            progress.write("interrupted; the same command goes on from here\n")
            raise
    return work.told()


@contextlib.contextmanager
def _room(out: Path) -> Iterator[Path]:
    """Hold a campaign's folder, and yield one in it that is gone afterwards.

    Raises:
        CliError: if another process is at the same campaign.
    """
    try:
        held = lock(out / LOCK)
    except AlreadyRunningError as error:
        hint = "wait until it is over, or choose another --out"
        raise CliError(f"a campaign is under way there already: {out}", hint) from error
    room = out / ROOM
    try:
        if room.exists():  # of one that was killed
            shutil.rmtree(room)
        room.mkdir()
        try:
            yield room
        finally:
            shutil.rmtree(room)
    finally:
        os.close(held)


class _Work:
    """A campaign under way.

    Args:
        kept: what is known of it.
        file: where that lies.
        progress: hears of every result.
    """

    def __init__(self, kept: Kept, file: Path, progress: TextIO) -> None:
        self._kept, self._file, self._progress = kept, file, progress
        self._trials = _drawn(kept)

    def strike(self, folder: Path) -> None:
        """Conduct the trials within the small world that are not there yet."""
        left = [trial for trial in self._left() if not trial.live]
        if not left:
            return
        with Conductor(self._kept.run, folder) as conductor:
            for trial in left:
                result = conductor.conduct(trial)
                self._rested(conductor)
                self._came(result)

    def rest(self, steps: int, folder: Path) -> None:
        """Take the steps without a fault that are left to be taken."""
        taken = self._kept.clean_steps
        if taken >= steps:
            return
        with Calm(self._kept.run, folder, self._kept.seed, taken) as calm:
            for count in stretches(steps - taken):
                calm.rest(count)
                self._rested(calm)
                self._save()
        self._say(
            f"{self._kept.clean_steps} steps without a fault, {len(self._kept.alarms)} alarms, "
            f"{self._kept.false_triggers} computed once more for nothing"
        )

    def resize(self, runs: int, folder: Path) -> None:
        """Conduct the runs that shrink and grow back and are left to be conducted."""
        for number in range(len(self._kept.resizes), runs):
            found = campaign_resizes.conduct(number, folder / f"run-{number}")
            self._kept.resizes.append(found)
            self._save()
            self._say(
                f"{found.steps} steps of a world that "
                f"{'shrank and grew back' if found.resized else 'did not grow back'}, "
                f"{len(found.alarms)} alarms, {found.false_triggers} computed once more for nothing"
            )

    def weigh(self, pairs: int, folder: Path) -> None:
        """Measure what detectors cost, as often as it is left to be."""
        left = pairs - len(self._kept.pairs)
        if left <= 0:
            return
        for pair in cost(job.usual(), folder, left):
            self._kept.pairs.append(pair)
            self._save()
        self._say(f"overhead measured in {units.count(len(self._kept.pairs), 'pair')}")

    def run_whole(self, folder: Path) -> None:
        """Conduct the trials that are whole runs and are not there yet."""
        for trial in self._left():
            self._came(campaign_runs.conduct(trial, folder / f"run-{trial.number}"))

    def told(self) -> Campaign:
        """Return what the campaign comes to so far."""
        kept = self._kept
        return campaign(
            kept.results,
            seed=kept.seed,
            trials=kept.trials,
            ranks=kept.run.world_size,
            clean=Clean(kept.clean_steps, kept.alarms, kept.false_triggers, kept.resizes),
            pairs=kept.pairs,
        )

    def _left(self) -> list[Trial]:
        done = {result.number for result in self._kept.results}
        return [trial for trial in self._trials if trial.number not in done]

    def _rested(self, at: Conductor | Calm) -> None:
        """Take over what the detectors said of steps without a fault."""
        self._kept.alarms += at.alarms
        self._kept.clean_steps += at.clean_steps
        self._kept.false_triggers += at.false_triggers
        at.alarms, at.clean_steps, at.false_triggers = [], 0, 0

    def _came(self, result: Result) -> None:
        self._kept.results.append(result)
        self._save()
        self._say(f"{len(self._kept.results)} of {len(self._trials)} trials: {words(result)}")

    def _save(self) -> None:
        whole.write(self._file, msgspec.json.encode(self._kept))

    def _say(self, line: str) -> None:
        self._progress.write(f"{line}\n")
        self._progress.flush()


def stretches(steps: int) -> list[int]:
    """Return how many steps without a fault are taken from one save to the next.

    >>> stretches(210)
    [100, 100, 10]
    """
    return [min(CLEAN_AT_ONCE, steps - taken) for taken in range(0, steps, CLEAN_AT_ONCE)]


def _drawn(kept: Kept) -> list[Trial]:
    """Return the trials of all classes, as many of each as of any other."""
    trials: list[Trial] = []
    for place, kind in enumerate(kept.classes):
        count = kept.trials * (place + 1) // len(kept.classes) - len(trials)
        if kind == "corruption":
            trials += catalogue.draw(
                kept.seed,
                count,
                ranks=kept.run.world_size,
                snapshots=len(SNAPSHOTS),
                live=campaign_runs.KINDS if kept.whole_runs else (),
            )
        else:
            trials += timed.draw(kind, kept.seed, count, ranks=job.RANKS, first=len(trials))
    return trials


def classes_of(text: str) -> tuple[Kind, ...]:
    """Return the classes that `--classes` names, in their usual order. Raises CliError."""
    named = [name.strip() for name in text.split(",")]
    for name in named:
        if name not in KINDS:
            raise CliError(
                f"--classes has {name!r}, expected some of {', '.join(KINDS)}",
                "write for example `--classes hang,straggler`",
                Exit.USAGE,
            )
    return tuple(kind for kind in KINDS if kind in named)


def words(result: Result) -> str:
    """Return what came of a trial in a few words."""
    what = f"{result.name} ({result.site})" if result.site else result.name
    if not result.effective:
        return f"{what}: left no trace"
    if result.crashed:
        return f"{what}: noticed by nobody, {result.evidence}"
    if not result.noticed:
        return f"{what}: MISSED"
    after = f"{result.latency} steps" if result.seconds is None else f"{result.seconds:.1f} s"
    told = f", blamed on {result.verdict or 'nothing'}" if result.expected else ""
    return f"{what}: noticed after {after}, culprit {result.named}{told}"


def _own(run_file: Path) -> TrainingRun:
    """Read the run that is to be struck. Raises BadFileError or CliError."""
    target, _ = intake.read(run_file, None)
    if not target.spec.campaign:
        raise CliError(
            f"spec.campaign is false, expected true of a run that is to be corrupted: {run_file}",
            "add `campaign: true` to the spec of a run whose results nobody needs",
            Exit.USAGE,
        )
    if target.spec.trainer.entrypoint != EMBEDDED or target.shard_count != 1:
        raise CliError(
            f"expected the embedded trainer, and replicas that have the whole state: {run_file}",
            "leave out trainer.entrypoint; dpShard, tp, pp and cp are 1",
            Exit.USAGE,
        )
    return target


def _kept(file: Path, asked: Asked, target: TrainingRun) -> Kept:
    """Return what is known of this campaign. Raises CliError if the file is of another one."""
    new = Kept(
        seed=asked.seed,
        trials=asked.trials,
        whole_runs=asked.whole_runs,
        classes=asked.classes,
        run=target,
    )
    if not file.exists():
        return new
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=Kept)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _no_results(f"{error}", file) from error
    for name in ("seed", "trials", "whole_runs", "classes", "run"):
        if getattr(kept, name) != getattr(new, name):
            raise CliError(
                f"{name} of the campaign that lies there is another one: {file}",
                "choose another --out",
                Exit.USAGE,
            )
    numbers = [result.number for result in kept.results]
    if len(set(numbers)) < len(numbers) or not {t.number for t in _drawn(kept)}.issuperset(numbers):
        raise _no_results("it has trials twice, or some that it does not consist of", file)
    return kept


def _no_results(why: str, file: Path) -> CliError:
    return CliError(
        f"not the results of a campaign: {why}: {file}",
        "remove it to begin anew, or choose another --out",
        Exit.USAGE,
    )
