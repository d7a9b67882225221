"""`holdfast measure`: takes the constants of a profile from small live runs on this machine.

Ranks are killed and frozen, a node is taken away, and every agent dies at once, so that each way
back is gone at least once. What a journal tells becomes part of a profile; what one machine can
not tell stays what it was, published or assumed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from orchestrator.cli import intake, whole
from orchestrator.cli.choices import Output
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.progress import Progress
from orchestrator.cli.supervise import supervise
from orchestrator.cli.tables import Column, rendered, text
from orchestrator.cli.units import count, seconds
from orchestrator.core import journal
from orchestrator.core.report import Report
from orchestrator.faults.plan import FaultPlan
from orchestrator.measuring import restarts, saves
from orchestrator.measuring.filling import filled, rows
from orchestrator.measuring.orders import order_all_s
from orchestrator.measuring.samples import Samples
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.folder import HOME_VARIABLE, RunFolder
from orchestrator.worlds.machine import node_names
from orchestrator.worlds.simulated import profiles
from orchestrator.worlds.simulated.profile import GPUS, Profile

TIMEOUT_S = 300.0
"""Of one run; it takes about a minute on two busy cores."""
STEPS, STEPS_LEAST = 90, 60
"""Of a run. Between two faults there must be room for saves to both tiers."""
LOST = "node-1"
ORDERED = (512, 4_096, GPUS)
"""Sizes in GPUs for which orders are worded and encoded."""


class Measured(NamedTuple):
    """What came of it."""

    profile: Profile
    table: str


def measure(
    *,
    run_file: Path | None,
    steps: int | None,
    base: Path | None,
    file: Path | None,
    progress: Sequence[Progress],
) -> Measured:
    """Run small jobs with faults, and fill a profile with what their journals tell.

    Args:
        run_file: the job; None for a small Llama on two nodes and a spare.
        steps: of that small job; None for STEPS, or what the run file says.
        base: the profile to fill; None for the one that comes with holdfast.
        file: where it is written, .json or .yaml; None for nowhere.
        progress: one for each run.

    Raises:
        BadFileError: if the base is no profile, or the run file no run.
        CliError: if the file can not be written there, the job is too small, or does not succeed.
    """
    if file is not None:
        _require_place(file)
    profile = profiles.packaged("measured") if base is None else profiles.read(base)
    run = _small(steps or STEPS) if run_file is None else _own(run_file, steps)
    plan = _plan(run)
    samples = Samples()
    with _folder() as root:
        for number, shown in enumerate(progress):
            samples.extend(_conduct(run, plan, root / f"run-{number}", shown))
    repeat = len(progress)
    named = f"--steps {run.spec.trainer.steps}" if run_file is None else run_file.name
    command = f"holdfast measure {named} --repeat {repeat}"
    taken = samples.taken()
    full = filled(
        profile,
        taken,
        {gpus: order_all_s(gpus) for gpus in ORDERED},
        gpus=run.world_size,
        source=f"{command}, {count(os.cpu_count() or 1, 'core')}",
    )
    if file is not None:
        whole.write(file, profiles.text(full, json=file.suffix == ".json").encode())
    table = rendered("constant", _COLUMNS, rows(full, taken), Output.TABLE)
    runs = f"{count(repeat, 'run')} of {count(run.spec.trainer.steps, 'step')}"
    return Measured(
        full, f"{runs} with {run.world_size} ranks; used at {GPUS} GPUs unless scaled\n\n{table}"
    )


def _span(value: float | None) -> str:
    return seconds(value)


_COLUMNS = (
    Column("WHAT", "name"),
    Column("HERE", "here", _span),
    Column("LEAST", "least", _span),
    Column("MOST", "most", _span),
    Column("SAMPLES", "samples", text),
    Column(f"AT {GPUS} GPUs", "value", _span),
    Column("WHICH IS", "origin", text),
    Column("SOURCE", "source", text, wide=True),
)


def _small(steps: int) -> TrainingRun:
    data = {
        "apiVersion": "holdfast.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "measure"},
        "spec": {
            "nodes": {"count": 2, "ranksPerNode": 2, "spares": 1},
            "parallelism": {"dpReplicate": 2, "dpShard": 2},
            "trainer": {"model": "debug", "steps": steps, "seqLen": 128, "globalBatch": 8},
            "checkpoint": {"everySteps": 10, "memoryEverySteps": 2, "keepLast": 3},
            "detection": {"detectWithin": "2s"},
        },
    }
    return msgspec.convert(data, TrainingRun)


def _own(run_file: Path, steps: int | None) -> TrainingRun:
    """Read a job that is large enough for every fault. Raises BadFileError or CliError."""
    if steps is not None:
        raise CliError(
            f"--steps is {steps}, expected none with a run file: {run_file}",
            "the run file has `trainer.steps`",
            Exit.USAGE,
        )
    run, _ = intake.read(run_file, None)
    nodes, trainer = run.spec.nodes, run.spec.trainer
    for name, found, least in (
        ("nodes.count", nodes.count, 2),
        ("nodes.spares", nodes.spares, 1),
        ("trainer.steps", trainer.steps, STEPS_LEAST),
    ):
        if found < least:
            raise CliError(
                f"spec.{name} is {found}, expected at least {least}: {run_file}",
                "a node is lost, and all of them die at once, to see how each comes back",
                Exit.USAGE,
            )
    return run


def _plan(run: TrainingRun) -> FaultPlan:
    """Return faults that go every way back: own memory, the buddy's, and the durable tier."""
    nodes, steps = run.spec.nodes, run.spec.trainer.steps
    one_each: list[dict[str, Any]] = [
        {"fault": "kill-rank", "rank": nodes.ranks_per_node - 1},
        {"fault": "freeze-rank", "rank": nodes.ranks_per_node},
        {"fault": "lose-node", "node": LOST},
        {"fault": "kill-rank", "rank": 0},
    ]
    # All at once: nobody has a copy any more.
    left = [{"fault": "kill-agent", "node": name} for name in node_names(run) if name != LOST]
    moments = [*range(1, len(one_each) + 1), *(len(one_each) + 1 for _ in left)]
    faults = [
        # An odd step: the newest state that is saved is often another one, so that work is lost.
        {"when": {"step": steps * moment // (len(one_each) + 2) | 1}, **fault}
        for moment, fault in zip(moments, [*one_each, *left], strict=True)
    ]
    return msgspec.convert({"kind": "FaultPlan", "faults": faults}, FaultPlan)


@contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder for the runs that is gone afterwards, whatever happens.

    It is a home of its own as well: these runs are not to be listed among those of the user, nor
    to be in the way of one that has their name.
    """
    root = Path(tempfile.mkdtemp(prefix="holdfast-measure-"))
    before = os.environ.get(HOME_VARIABLE)
    os.environ[HOME_VARIABLE] = str(root)
    try:
        yield root
    finally:
        if before is None:
            del os.environ[HOME_VARIABLE]
        else:
            os.environ[HOME_VARIABLE] = before
        shutil.rmtree(root)


def _conduct(run: TrainingRun, plan: FaultPlan, root: Path, progress: Progress) -> Samples:
    ended = supervise(run, plan, out=root, report=None, timeout_s=TIMEOUT_S, progress=progress)
    if ended.code is not Exit.OK:
        # Its folder will be gone; what it told is all that is left.
        raise CliError(
            ended.message.replace(f": {root}", ""),
            "nothing was measured; `holdfast run` with such a job leaves its logs",
            ended.code,
        )
    folder = RunFolder(root)
    entries = journal.read(folder.journal.read_bytes()).entries
    samples = saves.take(entries, run.spec.checkpoint.memory_every_steps)
    samples.extend(restarts.take(entries))
    _observe(msgspec.json.decode(folder.report.read_bytes(), type=Report), samples)
    return samples


def _observe(report: Report, samples: Samples) -> None:
    """Add what is no constant: how soon each kind of fault was found, decided on and over."""
    kinds = {fault.index: fault.description.split()[0] for fault in report.faults}
    for fault in report.faults:
        if fault.found_after_s is not None:
            samples.add(f"found-{kinds[fault.index]}", fault.found_after_s)
    for incident in report.incidents:
        if incident.decided_after_s is None or incident.first_step_after_s is None:
            continue
        for kind in {kinds[index] for index in incident.faults}:
            samples.add(f"decided-{kind}", incident.decided_after_s - incident.detected_after_s)
            samples.add(f"training-again-{kind}", incident.first_step_after_s)


def _require_place(file: Path) -> None:
    """Refuse, before anything runs, a file that could not be written when it is over."""
    if file.suffix not in (".json", ".yaml", ".yml"):
        raise CliError(
            f"--output is {file}, expected a name that ends in .json or .yaml",
            "the form follows from the name",
            Exit.USAGE,
        )
    if not file.absolute().parent.is_dir():
        raise CliError(f"no such folder: {file.absolute().parent}", "make it first", Exit.USAGE)
    if file.is_dir():
        raise CliError(
            f"a folder, expected the name of a file: {file}", "add a file name", Exit.USAGE
        )
