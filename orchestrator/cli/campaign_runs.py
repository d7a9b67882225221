"""The trials of a campaign that are whole runs: agents, controller, a fault plan, the report.

Some show that what is found in the small world is found in a run as well, and acted on; others are
how hangs and slow ranks are tried, which are a matter of time and not of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from orchestrator.campaign import job, timed
from orchestrator.campaign.catalogue import Blame, Trial
from orchestrator.campaign.judging import Named, Result
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.prepare import forget
from orchestrator.cli.progress import Quiet
from orchestrator.cli.supervise import supervise
from orchestrator.core.incident import CORRUPTION, STRAGGLER
from orchestrator.core.report import INFERRED, SHOWS_AS, IncidentReport, Report
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
}
KINDS = tuple(
    kind for kind, shape in SHAPES.items() if shape.shows_as in SHOWS_AS.get(kind, frozenset())
)
"""Those that there is a detector for."""
_VERDICTS: dict[str, Blame] = {"hardware": "hardware", "software": "workload"}
"""By the cause that an incident is given."""


def conduct(trial: Trial, out: Path) -> Result:
    """Run a small job with one fault to its end; return what the controller made of it.

    Raises:
        CliError: if the run can not be started, or takes too long.
    """
    if trial.group == "live":
        run = job.small(steps=STEPS)
    else:
        run = (job.timed if trial.group == "straggler" else job.small)(timed.STEPS)
    try:
        ended = supervise(
            run, plan_of(trial), out=out, report=None, timeout_s=TIMEOUT_S, progress=Quiet()
        )
    finally:
        forget(RunFolder(out), run.metadata.name)
    if ended.code is Exit.INTERRUPTED:
        raise CliError(ended.message, "the same command goes on from here", ended.code)
    report = msgspec.json.decode(RunFolder(out).report.read_bytes(), type=Report)
    if trial.group == "live":
        return judged(trial, report)
    struck_s = report.faults[0].at_s if report.faults else None
    return judged_in_time(trial, struck_s, report.incidents, report.final_step)


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


def plan_of(trial: Trial) -> FaultPlan:
    """Return the plan of a run that meets what a trial is."""
    step, shape = trial.step, trial.shape
    if trial.group == "live":
        step, shape = BEGIN, SHAPES[trial.live].fields
    fault = {"when": {"step": step}, "fault": trial.live, "rank": _culprit(trial), **shape}
    return msgspec.convert({"kind": "FaultPlan", "faults": [fault]}, FaultPlan)


def judged_in_time(
    trial: Trial, struck_s: float | None, incidents: Sequence[IncidentReport], steps: int
) -> Result:
    """Return what came of a run with a rank that stood still, or was slow.

    Who is named first counts, whether it is the culprit or not: the plan is the ground truth.

    Args:
        trial: what it was.
        struck_s: when the fault was let loose, on the run's clock; None if it was not.
        incidents: of the run, oldest first.
        steps: that were taken.
    """
    base = Result(
        number=trial.number,
        name=trial.name,
        group=trial.group,
        site=" ".join([trial.live, *(f"{name} {value}" for name, value in trial.shape.items())]),
        effective=struck_s is not None,
        steps=steps,
        expected=trial.blame,
    )
    if struck_s is None:
        return base
    found = [i for i in incidents if i.kind == trial.group and _found_at(i) >= struck_s]
    # Ranks of a busy machine are slow, too, for a while: they count against precision.
    accused = [i for i in incidents if i.kind == STRAGGLER and i.cause == "hardware"]
    rightly = [i for i in accused if trial.blame == "hardware" and _names(i, trial)]
    base = msgspec.structs.replace(base, accused=len(accused), rightly=len(rightly))
    slow = trial.group == "straggler"
    if slow:
        found = [i for i in found if _names(i, trial)]
    first = next(iter(found), None)
    killed = [i for i in incidents if _is_for_nothing(i, first)]
    base = msgspec.structs.replace(base, false_kills=len(killed))
    if first is None:
        return base
    return msgspec.structs.replace(
        base,
        noticed=True,
        seconds=_found_at(first) - struck_s,
        latency=max(first.reached_step - trial.step, 0),
        named=_named(first, _culprit(trial)),
        verdict=_VERDICTS.get(first.cause, "") if slow else "",
        evidence=f"{first.kind}: {'; '.join(first.evidence)}; {first.reason}",
    )


def _found_at(incident: IncidentReport) -> float:
    return incident.began_s + incident.detected_after_s


def _is_for_nothing(incident: IncidentReport, found: IncidentReport | None) -> bool:
    """Whether a run was begun again for something that was not wrong with it."""
    if incident.kind not in INFERRED:
        return False
    return found is None or incident.id != found.id


def _names(incident: IncidentReport, trial: Trial) -> bool:
    return f"rank {_culprit(trial)}" in incident.suspects


def _culprit(trial: Trial) -> int:
    """Return the rank that is struck: another one from run to run."""
    return trial.number % job.RANKS if trial.group == "live" else trial.rank


def _named(incident: IncidentReport, culprit: int) -> Named:
    """Return whom an incident blames: of each node of these runs, one rank is in the world."""
    blamed = set(incident.suspects)
    if not blamed:
        return "nobody"
    own = {f"rank {culprit}", f"node-{culprit}"}
    if not blamed & own:
        return "wrong"
    return "exact" if blamed <= own else "among others"
