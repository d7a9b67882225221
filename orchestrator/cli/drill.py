"""`holdfast drill`: a run with faults, the same run without, and whether a bit differs.

The proof that recovery is recovery: final weights, optimizer state, data cursor and the loss of
every step of the disturbed run must be those of its undisturbed twin, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.outcome import Outcome
from orchestrator.cli.progress import Progress
from orchestrator.cli.supervise import supervise
from orchestrator.core.report import Report
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.folder import RunFolder


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a drill showed."""

    disturbed: Report
    twin: Report
    differences: list[str]
    """In words; empty if the two runs ended with the same bits."""

    @property
    def identical(self) -> bool:
        """Whether recovery left no trace in the result."""
        return not self.differences


def drill(
    run: TrainingRun,
    plan: FaultPlan,
    *,
    out: Path,
    timeout_s: float | None,
    progress: Progress,
    twin_progress: Progress,
) -> Verdict:
    """Run a job with the faults of a plan, then without any, and compare.

    Args:
        run: the job.
        plan: what is let loose on it; checked against it already.
        out: folder for both runs.
        timeout_s: of each of the two.
        progress: shows the disturbed run.
        twin_progress: shows the other.

    Raises:
        CliError: if one of them can not be started, takes too long, or is interrupted.
    """
    disturbed = _run(run, plan, out / "disturbed", timeout_s, progress)
    twin = _run(twin_of(run, out), None, out / "twin", timeout_s, twin_progress)
    return Verdict(disturbed=disturbed, twin=twin, differences=differences(disturbed, twin))


def twin_of(run: TrainingRun, out: Path) -> TrainingRun:
    """Return the run without faults: with a device ledger of its own, as the other one has."""
    replace = msgspec.structs.replace
    own = str(RunFolder(out / "twin").devices.absolute())
    recovery = replace(run.spec.recovery, device_ledger=own)
    return replace(
        run,
        metadata=replace(run.metadata, name=f"{run.metadata.name}-twin"),
        spec=replace(run.spec, recovery=recovery),
    )


def differences(one: Report, other: Report) -> list[str]:
    """Return in what the results of two runs differ, in words."""
    found = [
        f"{name} is {getattr(one, name)}, the twin's is {getattr(other, name)}"
        for name in ("state", "final_step", "final_state_digest", "losses_digest")
        if getattr(one, name) != getattr(other, name)
    ]
    if one.final_state_digest is None:
        found.append("no rank reported a final state")
    first = next((a[0] for a, b in zip(one.losses, other.losses, strict=False) if a != b), None)
    if first is not None:
        found.append(f"the first loss that differs is that of step {first}")
    for name in ("losses_missing", "divergences", "digests_differ", "replicas_differ"):
        found += [
            f"{who}: {name} {values[:8]}"
            for who, values in (("disturbed", getattr(one, name)), ("twin", getattr(other, name)))
            if values
        ]
    return found


def cut_short(ended: Outcome) -> CliError | None:
    """Return what to tell of a run that did not come to its own end, None if it did.

    It has no second life: faults of its plan would be let loose twice.
    """
    if ended.code not in (Exit.INTERRUPTED, Exit.TIMED_OUT):
        return None
    more = "allow it more with --timeout; " if ended.code is Exit.TIMED_OUT else ""
    return CliError(
        ended.message,
        f"{more}`holdfast drill` begins anew in another folder with --out",
        ended.code,
    )


def _run(
    run: TrainingRun,
    plan: FaultPlan | None,
    out: Path,
    timeout_s: float | None,
    progress: Progress,
) -> Report:
    ended = supervise(run, plan, out=out, report=None, timeout_s=timeout_s, progress=progress)
    if error := cut_short(ended):
        raise error
    return msgspec.json.decode(RunFolder(out).report.read_bytes(), type=Report)
