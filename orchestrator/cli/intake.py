"""Reads what a user hands in: run file, fault plan, durations; and says it back in words."""

from __future__ import annotations

import itertools
from pathlib import Path

from orchestrator import compose
from orchestrator.cli import units
from orchestrator.cli.errors import CliError, Exit
from orchestrator.document import BadFileError
from orchestrator.faults import plan as plans
from orchestrator.faults.plan import FaultPlan, PlanError
from orchestrator.protocol.fitting import EMBEDDED, warm_up_words
from orchestrator.protocol.ramp import Ramp, Stage
from orchestrator.protocol.runfile import TrainingRun, seconds
from orchestrator.worlds.machine import node_names

PROCESSES_MAX = 4096
"""Agents and ranks of a run on one machine; one that asks for more has a number wrong."""


def read(run_file: Path, plan_file: Path | None) -> tuple[TrainingRun, FaultPlan | None]:
    """Read a run file and, if there is one, the fault plan for it.

    Raises:
        BadFileError: if one of them is not what it should be.
        PlanError: if the plan names what the run does not have.
    """
    run = compose.read_run(run_file)
    _require_room(run, run_file)
    if plan_file is None:
        return run, None
    plan = compose.read_plan(plan_file)
    try:
        plans.check(
            plan,
            world_size=run.world_size,
            nodes=node_names(run),
            steps=run.spec.trainer.steps,
        )
    except PlanError as error:
        raise PlanError(f"{error}: {plan_file}", error.hint) from error
    return run, plan


def _require_room(run: TrainingRun, run_file: Path) -> None:
    nodes = run.spec.nodes
    agents = nodes.count + nodes.spares
    if agents + run.world_size > PROCESSES_MAX:
        raise BadFileError(
            f"spec.nodes asks for {agents} agents and {run.world_size} ranks, expected at most "
            f"{PROCESSES_MAX} processes on one machine: {run_file}",
            "fewer nodes.count, nodes.ranksPerNode or nodes.spares",
        )


def span_s(option: str, text: str) -> float:
    """Return the duration that an option was given, in seconds.

    Raises:
        CliError: if it is no duration, or is zero.
    """
    try:
        span = seconds(text)
    except ValueError as error:
        raise CliError(f"{option}: {error}", "write for example `10m`", Exit.USAGE) from error
    if span <= 0:
        raise CliError(
            f"{option} is {text}, expected more than 0 s", "write for example `10m`", Exit.USAGE
        )
    return span


def words(run: TrainingRun, plan: FaultPlan | None) -> str:
    """Return what a run file and plan ask for, in a few lines."""
    nodes, trainer, count = run.spec.nodes, run.spec.trainer, units.count
    ranks, spares = count(nodes.ranks_per_node, "rank"), count(nodes.spares, "spare")
    lines = [
        f"{run.metadata.name}: {_trained(run)}, {count(trainer.steps, 'step')}",
        f"{count(nodes.count, 'node')} of {ranks}, {spares}",
        f"faults are detected within {run.spec.detection.detect_within}",
    ]
    if trainer.entrypoint == EMBEDDED:
        samples, tokens = count(trainer.global_batch, "sample"), count(trainer.seq_len, "token")
        later = [_change(*pair) for pair in itertools.pairwise(Ramp.of(trainer).stages)]
        lines.insert(1, "; ".join([f"{samples} of {tokens} per step", *later]))
    if note := warm_up_words(run):
        lines.append(f"note: {note}")
    if plan is not None:
        drawn = plan.drawn()
        happen = f"{len(drawn)} of {units.count(len(plan.faults), 'fault')}"
        lines.append(f"{happen} happen{'s' * (len(drawn) == 1)} (seed {plan.seed}):")
        lines += [f"  {armed.index}  {armed.fault.describe()}" for armed in drawn]
    return "\n".join(lines)


def _change(before: Stage, stage: Stage) -> str:
    """Say what steps have from a stage on that they had otherwise before."""
    sizes = f"{stage.batch}" if stage.batch != before.batch else ""
    if stage.length != before.length:
        samples = units.count(stage.batch, "sample")
        sizes = f"{samples} of {units.count(stage.length, 'token')}"
    return f"{sizes or stage.batch} from {units.count(stage.tokens, 'token')} on"


def _trained(run: TrainingRun) -> str:
    trainer = run.spec.trainer
    if trainer.entrypoint != EMBEDDED:
        return f"trainer {trainer.entrypoint}"
    return trainer.model if isinstance(trainer.model, str) else "model of its own sizes"
