"""`holdfast measure`: takes the constants of a profile from small live runs on this machine.

Ranks are killed and frozen, a node is taken away, and every agent dies at once, so that each way
back is gone at least once; state is corrupted, and products come out wrong, until detectors condemn
who did it. What a journal tells becomes part of a profile; what one machine can not tell stays what
it was, published or assumed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from orchestrator.cli import intake, whole
from orchestrator.cli.choices import Form, Output
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.progress import Progress
from orchestrator.cli.supervise import supervise
from orchestrator.cli.tables import Column, rendered, text
from orchestrator.cli.units import count, seconds
from orchestrator.core import journal
from orchestrator.core.report import Report
from orchestrator.faults.corruption import CorruptionKind
from orchestrator.faults.plan import FaultPlan
from orchestrator.measuring import restarts, saves, silent
from orchestrator.measuring.filling import filled, rows
from orchestrator.measuring.orders import order_all_s
from orchestrator.measuring.samples import Samples, Taken
from orchestrator.protocol.ids import Rank, Step
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
CORRUPTED: dict[str, CorruptionKind] = {"flip-bit": "state", "wrong-matmul": "persistent"}
"""Faults of a plan, and the kind of silent corruption that each is."""
KINDS_MEASURED = tuple(CORRUPTED.values())
CORRUPTIONS: tuple[Mapping[str, Any], ...] = (
    {
        "fault": "flip-bit",
        "when": {"step": 8},
        "rank": 1,
        "state": "exp_avg",
        "element": 5,
        "bit": 3,
        "atStep": 18,
    },
    {"fault": "wrong-matmul", "when": {"step": 8}, "rank": 1, "magnitude": 0.001, "atStep": 18},
)
"""Silent, in the middle of a run, and each in one of its own: of two nodes that are found guilty
within a day the second counts as suspected only."""
ORDERED = (512, 4_096, GPUS)
"""Sizes in GPUs for which orders are worded and encoded."""


class Measured(NamedTuple):
    """What came of it."""

    profile: Profile
    table: str

    def told(self, output: Form) -> str:
        """Return the profile as its file would have it in JSON, or a table of it."""
        if output is Form.JSON:
            return profiles.text(self.profile, json=True).rstrip()
        return self.table


def measure(
    *,
    run_file: Path | None,
    steps: int | None,
    base: Path | None,
    file: Path | None,
    repeat: int,
    progress: Callable[[], Progress],
) -> Measured:
    """Run small jobs with faults, and fill a profile with what their journals tell.

    Args:
        run_file: the job; None for a small Llama on two nodes and a spare.
        steps: of that small job; None for STEPS, or what the run file says.
        base: the profile to fill; None for the one that comes with holdfast.
        file: where it is written, .json or .yaml; None for nowhere.
        repeat: how many runs of each sort; those with silent corruption only without a run file.
        progress: makes one for each run.

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
        for number in range(repeat):
            samples.extend(_conduct(run, plan, root / f"run-{number}", progress()))
            for fault in () if run_file is not None else CORRUPTIONS:
                name = f"{fault['fault']}-{number}"
                samples.extend(_corrupted(fault, root / name, progress()))
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
    spans = {name: each for name, each in taken.items() if not name.startswith(silent.LOOKS)}
    table = rendered("constant", _COLUMNS, rows(full, spans), Output.TABLE)
    runs = f"{count(repeat, 'run')} of {count(run.spec.trainer.steps, 'step')}"
    words = f"{runs} with {run.world_size} ranks; used at {GPUS} GPUs unless scaled\n\n{table}"
    return Measured(full, words + _looks(taken))


def _looks(taken: Mapping[str, Taken]) -> str:
    """Return what was seen of detectors of silent corruption, in a line for each."""
    lines = [
        f"{kind} corruption: condemned after {count(round(each.median), 'look')} "
        f"({each.least:g} to {each.most:g}; {count(each.samples, 'sample')})"
        for kind in KINDS_MEASURED
        if (each := taken.get(f"{silent.LOOKS}-{kind}"))
    ]
    return "".join(f"\n{line}" for line in ["", *lines]) if lines else ""


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


def _watched() -> TrainingRun:
    """Return a job of three who hold the same, looked at in every step as a whole."""
    data = {
        "apiVersion": "holdfast.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "measure-silent"},
        "spec": {
            "nodes": {"count": 3, "ranksPerNode": 1, "spares": 1},
            "parallelism": {"dpReplicate": 3, "dpShard": 1},
            "trainer": {"model": "debug", "steps": 40, "seqLen": 64, "globalBatch": 3},
            "checkpoint": {"everySteps": 50, "memoryEverySteps": 5},
            "detection": {
                "detectWithin": "3s",
                "digestShare": 1.0,
                "replayShare": 1.0,
                "repair": False,
            },
        },
    }
    return msgspec.convert(data, TrainingRun)


def _corrupted(fault: Mapping[str, Any], root: Path, progress: Progress) -> Samples:
    """Run that job with numbers that are silently wrong on one node; return when it was condemned.

    Raises:
        CliError: if the run does not succeed, or the node was not condemned.
    """
    run = _watched()
    plan = msgspec.convert({"kind": "FaultPlan", "faults": [fault]}, FaultPlan)
    folder = _ran(run, plan, root, progress)
    entries = journal.read(folder.journal.read_bytes()).entries
    rank = Rank(fault["rank"])
    try:
        return silent.take(
            entries,
            kind=CORRUPTED[fault["fault"]],
            rank=rank,
            node=node_names(run)[rank],
            onset=Step(fault["atStep"]),
        )
    except silent.UnnoticedError as error:
        raise CliError(
            str(error), "nothing was measured; `holdfast campaign` counts misses", Exit.ERROR
        ) from error


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
    folder = _ran(run, plan, root, progress)
    entries = journal.read(folder.journal.read_bytes()).entries
    samples = saves.take(entries, run.spec.checkpoint.memory_every_steps)
    samples.extend(restarts.take(entries))
    _observe(msgspec.json.decode(folder.report.read_bytes(), type=Report), samples)
    return samples


def _ran(run: TrainingRun, plan: FaultPlan, root: Path, progress: Progress) -> RunFolder:
    """Run a job to its end; return its folder. Raises CliError if it does not succeed."""
    ended = supervise(run, plan, out=root, report=None, timeout_s=TIMEOUT_S, progress=progress)
    if ended.code is not Exit.OK:
        # Its folder will be gone; what it told is all that is left.
        raise CliError(
            ended.message.replace(f": {root}", ""),
            "nothing was measured; `holdfast run` with such a job leaves its logs",
            ended.code,
        )
    return RunFolder(root)


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
            f"--file is {file}, expected a name that ends in .json or .yaml",
            "the form follows from the name",
            Exit.USAGE,
        )
    if not file.absolute().parent.is_dir():
        raise CliError(f"no such folder: {file.absolute().parent}", "make it first", Exit.USAGE)
    if file.is_dir():
        raise CliError(
            f"a folder, expected the name of a file: {file}", "add a file name", Exit.USAGE
        )
