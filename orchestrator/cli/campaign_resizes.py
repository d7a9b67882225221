"""Whole runs of a campaign without a fault of a rank, whose worlds shrink and grow back.

A node is taken away and given back, as its owner may do, and there is no spare. What detectors say
of any rank or device in such a run is a false alarm, and so is a step that is computed once more.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from orchestrator.campaign import job
from orchestrator.campaign.summary import Resized
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.prepare import forget
from orchestrator.cli.progress import Quiet
from orchestrator.cli.supervise import supervise
from orchestrator.core.incident import CORRUPTION, REPAIR, SLOW_LINK, STRAGGLER
from orchestrator.core.report import IncidentReport, Report
from orchestrator.faults.plan import FaultPlan
from orchestrator.worker.findings import COMPUTED_AGAIN, IT_IS_THE_DATA
from orchestrator.worlds.folder import RunFolder

STEPS, TAKEN_AT, AWAY = 240, 30, "1s"
"""Of a run; after which of them a node is taken away, and for how long."""
TIMEOUT_S = 240.0
REDUCTIONS = ("deterministic", "fast")
"""In turn: with the first, steps come out the same whatever the size of the world."""
_ACCUSING = frozenset({CORRUPTION, REPAIR, SLOW_LINK, "hang"})
"""Kinds of incident for which nothing is wrong with any rank, device or way here."""


def conduct(number: int, out: Path) -> Resized:
    """Run a job that loses a node and gets it back; return what was said of it.

    Args:
        number: which of them: another node is taken away each time.
        out: its folder.

    Raises:
        CliError: if the run can not be started, or takes too long.
    """
    run = job.resizing(STEPS, REDUCTIONS[number % len(REDUCTIONS)])
    taken = {"fault": "lose-node", "node": f"node-{number % job.RANKS}", "for": AWAY}
    plan = {"kind": "FaultPlan", "faults": [{"when": {"step": TAKEN_AT}, **taken}]}
    folder = RunFolder(out)
    try:
        ended = supervise(
            run, msgspec.convert(plan, FaultPlan), out=out, report=None, timeout_s=TIMEOUT_S,
            progress=Quiet(),
        )  # fmt: skip
    finally:
        forget(folder, run.metadata.name)
    if ended.code is Exit.INTERRUPTED:
        raise CliError(ended.message, "the same command goes on from here", ended.code)
    report = msgspec.json.decode(folder.report.read_bytes(), type=Report)
    return judged(report, folder.rank_log(0).read_text(encoding="utf-8", errors="replace"))


def judged(report: Report, log: str) -> Resized:
    """Return what was said of a run that shrank and grew back.

    Args:
        report: of the run.
        log: of its rank 0, which says which steps were computed once more.
    """
    alarms = [f"{i.kind}: {'; '.join(i.evidence)}" for i in report.incidents if _is_false(i)]
    again = sorted({*report.divergences, *report.digests_differ})
    alarms += [f"step {step} came out otherwise when it was computed again" for step in again]
    if report.replicas_differ:
        alarms.append(f"ranks {report.replicas_differ} ended with another state than others")
    if report.final_step < report.steps:
        alarms.append(f"the run ended after step {report.final_step}: {report.reason}")
    lines = log.splitlines()
    return Resized(
        steps=report.final_step,
        resized=report.replicas_least < job.RANKS == report.replicas,
        alarms=tuple(alarms),
        false_triggers=sum(IT_IS_THE_DATA in line or COMPUTED_AGAIN in line for line in lines),
    )


def _is_false(incident: IncidentReport) -> bool:
    """Whether an incident accuses somebody, or stands for nothing that happened.

    That a node was gone, and that the run grew back, happened. Who is slow for what it has to do is
    reported and not accused.
    """
    if incident.kind == STRAGGLER:
        return incident.cause == "hardware"
    return incident.kind in _ACCUSING or incident.false_alarm
