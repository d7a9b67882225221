"""Runs a campaign: trials, steps without faults, overhead; each result is kept as soon as it is."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import msgspec

from orchestrator.campaign import catalogue, job, timed
from orchestrator.campaign.calm import Calm
from orchestrator.campaign.catalogue import SELECTABLE, Group, Trial
from orchestrator.campaign.conduct import SNAPSHOTS, Conductor
from orchestrator.campaign.costs import cost
from orchestrator.campaign.judging import Result
from orchestrator.campaign.summary import Campaign, campaign
from orchestrator.cli import campaign_kept, campaign_resizes, campaign_runs, intake, units
from orchestrator.cli.campaign_kept import CORRUPTION, KINDS, Came, Kept, Kind, Which
from orchestrator.cli.errors import CliError, Exit
from orchestrator.protocol.fitting import EMBEDDED
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server.journal import AlreadyRunningError, lock

ROOM, LOCK = "room", "campaign.lock"
"""In a campaign's folder: what trials leave while it is under way, and its lock."""
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
    groups: tuple[Group, ...] = SELECTABLE
    """Of corruption: what trials are drawn from."""
    resizes: int = 0
    harm: bool = False
    """Whether to tell which faults would do harm."""


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
    which = Which(
        seed=asked.seed,
        trials=asked.trials,
        whole_runs=asked.whole_runs,
        classes=asked.classes,
        groups=asked.groups,
        harm=asked.harm,
        run=target,
    )
    out.mkdir(parents=True, exist_ok=True)
    with _room(out) as room:
        work = _Work(campaign_kept.kept(out, which, _numbers), progress)
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
        CliError: if another process is at the same campaign, or the folder is somebody else's.
    """
    try:
        held = lock(out / LOCK)
    except AlreadyRunningError as error:
        hint = "wait until it is over, or choose another --out"
        raise CliError(f"a campaign is under way there already: {out}", hint) from error
    room = out / ROOM
    try:
        if room.exists():
            _require_own(out, room)
            shutil.rmtree(room)
        room.mkdir()
        try:
            yield room
        finally:
            shutil.rmtree(room)
    finally:
        os.close(held)


def _require_own(out: Path, room: Path) -> None:
    """Refuse a folder that no campaign that was killed can have left. Raises CliError."""
    # Who was killed before anything was known has put nothing into it.
    if not (out / campaign_kept.NAME).exists() and any(room.iterdir()):
        raise CliError(
            f"a folder of another kind is in the way: {room}",
            "choose another --out, or move it elsewhere",
            Exit.USAGE,
        )


class _Work:
    """A campaign under way.

    Args:
        kept: what is known of it.
        progress: hears of every result.
    """

    def __init__(self, kept: Kept, progress: TextIO) -> None:
        self._kept, self._progress = kept, progress
        self._trials = _drawn(kept.which)

    def strike(self, folder: Path) -> None:
        """Conduct the trials within the small world that are not there yet."""
        left = [trial for trial in self._left() if not trial.live]
        if not left:
            return
        which, known = self._kept.which, self._kept.results
        with Conductor(which.run, folder, known, unwatched=which.harm) as conductor:
            for trial in left:
                result = conductor.conduct(trial)
                self._came(msgspec.structs.replace(_rested(conductor), result=result))

    def rest(self, steps: int, folder: Path) -> None:
        """Take the steps without a fault that are left to be taken."""
        which, taken = self._kept.which, self._kept.calm_steps
        if taken >= steps:
            return
        with Calm(which.run, folder, which.seed, taken) as calm:
            for count in stretches(steps - taken):
                calm.rest(count)
                self._kept.add(msgspec.structs.replace(_rested(calm), calm=True))
        clean = self._kept.clean
        self._say(
            f"{clean.steps} steps without a fault, {len(clean.alarms)} alarms, "
            f"{clean.false_triggers} computed once more for nothing"
        )

    def resize(self, runs: int, folder: Path) -> None:
        """Conduct the runs that shrink and grow back and are left to be conducted."""
        for number in range(len(self._kept.clean.resizes), runs):
            found = campaign_resizes.conduct(number, folder / f"run-{number}")
            self._kept.add(Came(resized=found))
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
            self._kept.add(Came(pair=pair))
        self._say(f"overhead measured in {units.count(len(self._kept.pairs), 'pair')}")

    def run_whole(self, folder: Path) -> None:
        """Conduct the trials that are whole runs and are not there yet."""
        for trial in self._left():
            result = campaign_runs.conduct(trial, folder / f"run-{trial.number}")
            self._came(Came(result=result))

    def told(self) -> Campaign:
        """Return what the campaign comes to so far."""
        kept, which = self._kept, self._kept.which
        return campaign(
            kept.results,
            seed=which.seed,
            trials=which.trials,
            ranks=which.run.world_size,
            clean=kept.clean,
            pairs=kept.pairs,
        )

    def _left(self) -> list[Trial]:
        done = {result.number for result in self._kept.results}
        return [trial for trial in self._trials if trial.number not in done]

    def _came(self, of_trial: Came) -> None:
        self._kept.add(of_trial)
        assert of_trial.result is not None
        said = words(of_trial.result)
        self._say(f"{len(self._kept.results)} of {len(self._trials)} trials: {said}")

    def _say(self, line: str) -> None:
        self._progress.write(f"{line}\n")
        self._progress.flush()


def stretches(steps: int) -> list[int]:
    """Return how many steps without a fault are taken from one save to the next.

    >>> stretches(210)
    [100, 100, 10]
    """
    return [min(CLEAN_AT_ONCE, steps - taken) for taken in range(0, steps, CLEAN_AT_ONCE)]


def _rested(at: Conductor | Calm) -> Came:
    """Take over what the detectors said of steps without a fault."""
    came = Came(
        alarms=tuple(at.alarms), clean_steps=at.clean_steps, false_triggers=at.false_triggers
    )
    at.alarms, at.clean_steps, at.false_triggers = [], 0, 0
    return came


def _drawn(which: Which) -> list[Trial]:
    """Return the trials of all classes, as many of each as of any other."""
    # Who asks for some groups asks for no whole runs, which are a group of their own.
    live = campaign_runs.KINDS if which.whole_runs and which.groups == SELECTABLE else ()
    trials: list[Trial] = []
    for place, kind in enumerate(which.classes):
        count = which.trials * (place + 1) // len(which.classes) - len(trials)
        if kind == "corruption":
            trials += catalogue.draw(
                which.seed,
                count,
                ranks=which.run.world_size,
                snapshots=len(SNAPSHOTS),
                live=live,
                groups=which.groups,
            )
        else:
            trials += timed.draw(kind, which.seed, count, ranks=job.RANKS, first=len(trials))
    return trials


def _numbers(which: Which) -> list[int]:
    return [trial.number for trial in _drawn(which)]


def classes_of(text: str) -> tuple[Kind, ...]:
    """Return the classes that `--classes` names, in their usual order. Raises CliError."""
    named = _some_of(KINDS, text, "--classes", "hang,straggler")
    return tuple(kind for kind in KINDS if kind in named)


def groups_of(text: str | None, classes: tuple[Kind, ...]) -> tuple[Group, ...]:
    """Return the groups that `--groups` names, in their usual order: all without.

    Args:
        text: what was given.
        classes: that are let loose.

    Raises:
        CliError: if they are none, or of what is not let loose.
    """
    if text is None:
        return SELECTABLE
    named = _some_of(SELECTABLE, text, "--groups", "state,persistent")
    if CORRUPTION not in classes:
        raise CliError(
            f"--groups is given, expected {CORRUPTION} among --classes: {', '.join(classes)}",
            f"leave it out, or add {CORRUPTION} to --classes",
            Exit.USAGE,
        )
    return tuple(group for group in SELECTABLE if group in named)


def _some_of(known: Sequence[str], text: str, option: str, example: str) -> list[str]:
    named = [name.strip() for name in text.split(",")]
    for name in named:
        if name not in known:
            raise CliError(
                f"{option} has {name!r}, expected some of {', '.join(known)}",
                f"write for example `{option} {example}`",
                Exit.USAGE,
            )
    return named


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
