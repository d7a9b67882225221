"""The trials of a campaign that are whole runs: agents, controller, a fault plan, the report.

They show that what is found in the small world is found in a run as well, and acted on; and they
are how hangs and slow ranks are tried, which are a matter of time and not of numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from orchestrator.campaign import job
from orchestrator.campaign.catalogue import Trial
from orchestrator.campaign.judging import Named, Result
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.progress import Quiet
from orchestrator.cli.supervise import supervise
from orchestrator.core.incident import CORRUPTION
from orchestrator.core.report import SHOWS_AS, IncidentReport, Report
from orchestrator.faults.plan import FaultPlan
from orchestrator.worlds.folder import RunFolder

STEPS, BEGIN, STRIKE = 80, 8, 30
TIMEOUT_S = 180.0


class Shape(NamedTuple):
    """A kind of fault that a run of its own is made for."""

    shows_as: str
    """Kind of incident."""
    fields: dict[str, Any]


SHAPES: dict[str, Shape] = {
    "flip-bit": Shape(CORRUPTION, {"state": "exp_avg", "element": 5, "bit": 3, "atStep": STRIKE}),
    "wrong-matmul": Shape(
        CORRUPTION, {"tensor": "layers.1.ffn.w1.weight", "magnitude": 0.001, "atStep": STRIKE}
    ),
    "freeze-rank": Shape("hang", {}),
    "spin-rank": Shape("hang", {}),
    "slow-rank": Shape("straggler", {"share": 0.5}),
}
KINDS = tuple(
    kind for kind, shape in SHAPES.items() if shape.shows_as in SHOWS_AS.get(kind, frozenset())
)
"""Those that there is a detector for."""


def conduct(trial: Trial, out: Path) -> Result:
    """Run a small job with one fault to its end; return what the controller made of it.

    Raises:
        CliError: if the run can not be started, or takes too long.
    """
    run = job.small(steps=STEPS)
    fault: dict[str, Any] = {"when": {"step": BEGIN}, "fault": trial.live, "rank": _culprit(trial)}
    fault |= SHAPES[trial.live].fields
    plan = msgspec.convert({"kind": "FaultPlan", "faults": [fault]}, FaultPlan)
    ended = supervise(run, plan, out=out, report=None, timeout_s=TIMEOUT_S, progress=Quiet())
    if ended.code is Exit.INTERRUPTED:
        raise CliError(ended.message, "the same command goes on from here", ended.code)
    report = msgspec.json.decode(RunFolder(out).report.read_bytes(), type=Report)
    return judged(trial, report)


def judged(trial: Trial, report: Report) -> Result:
    """Return what came of a run: whether an incident is owed to the fault, and who was named."""
    if not report.faults:
        return Result(number=trial.number, name=trial.name, group="live", effective=False)
    fault = report.faults[0]
    incident = next((i for i in report.incidents if i.id == fault.found_by), None)
    base = Result(
        number=trial.number,
        name=trial.name,
        group="live",
        site=trial.live,
        effective=True,
        noticed=incident is not None,
        seconds=fault.found_after_s,
    )
    if incident is None:
        return base
    return msgspec.structs.replace(
        base,
        named=_named(incident, _culprit(trial)),
        evidence=f"{incident.kind}: {'; '.join(incident.evidence)}",
    )


def _culprit(trial: Trial) -> int:
    """Return the rank that is struck: another one from run to run."""
    return trial.number % job.RANKS


def _named(incident: IncidentReport, culprit: int) -> Named:
    """Return whom an incident blames: of each node of these runs, one rank is in the world."""
    blamed = {name for name in incident.suspects if name.startswith("rank ")}
    nodes = {name for name in incident.suspects if not name.startswith("rank ")}
    if not blamed and not nodes:
        return "nobody"
    if f"rank {culprit}" not in blamed and f"node-{culprit}" not in nodes:
        return "wrong"
    return "exact" if len(blamed) <= 1 and len(nodes) <= 1 else "among others"
