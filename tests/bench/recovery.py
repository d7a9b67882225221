"""How long from a fault to the first new step: Holdfast against torchrun, alternating, in one run.

    python -m tests.bench.recovery [--rounds 7] [--json]

Each round runs the same job under Holdfast (a rank killed, a rank frozen, a node lost, all at
`detectWithin: 2s`; then a rank frozen at the default of 10 s) and under `torchrun --max-restarts`
with torch.distributed.checkpoint (a rank killed), with the same model, ranks and interval between
checkpoints. Printed are medians and their ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from orchestrator import compose
from orchestrator.cli.follow import Follower
from orchestrator.core import journal
from orchestrator.core.events import Reported
from orchestrator.core.report import IncidentReport
from orchestrator.protocol.messages import FaultCarriedOut
from orchestrator.protocol.runfile import TrainingRun
from tests import runfiles
from tests.bench import ending
from tests.runs import REPOSITORY, Job

SAVE_EVERY = 5
CRASH_AT, FREEZE_AT, LOSS_AT, STEPS = 17, 32, 47, 60
DETECT_WITHIN_S, DEFAULT_WITHIN_S = 2.0, 10.0
PHASES = ("detect", "decide", "stop", "start", "rendezvous", "restore", "first_step")
WAIT_S = 180.0


def run_file(detect_within_s: float = DETECT_WITHIN_S) -> dict[str, Any]:
    """Return the job: the debug preset on 2 nodes of 2 ranks, and a spare."""
    return runfiles.fields(
        "bench",
        trainer={"model": "debug", "steps": STEPS, "seqLen": 128, "globalBatch": 8},
        checkpoint={"everySteps": 20, "memoryEverySteps": SAVE_EVERY},
        detection={"detectWithin": f"{detect_within_s:g}s"},
    )


def holdfast(root: Path) -> dict[str, dict[str, float]]:
    """Run the job with faults; return seconds from each to the first new step, by phase."""
    faults = {
        "crash": {"when": {"step": CRASH_AT}, "fault": "kill-rank", "rank": 1},
        "freeze": {"when": {"step": FREEZE_AT}, "fault": "freeze-rank", "rank": 2},
        "node_loss": {"when": {"step": LOSS_AT}, "fault": "lose-node", "node": "node-1"},
    }
    found = _run(Job(root / "short", run_file(), list(faults.values())), list(faults))
    job = Job(root / "default", run_file(DEFAULT_WITHIN_S), [faults["freeze"]])
    return found | _run(job, ["freeze_default"])


def _run(job: Job, names: list[str]) -> dict[str, dict[str, float]]:
    """Run a job to its end; return what each of its faults, as `names` calls them, has cost.

    Raises:
        RuntimeError: if the run did not succeed, or found something else than what was broken.
    """
    code, report = job.conduct("--quiet", timeout_s=WAIT_S)
    if code != 0 or len(report.incidents) != len(names) or report.false_alarms:
        found = [f"{i.kind}: {i.reason}" for i in report.incidents]
        raise RuntimeError(f"run ended with {code}, incidents {found}: {job.output()}")
    struck = _struck_at(job)
    state = Follower(job.folder).poll()
    assert state is not None
    steps = {
        "step_p50": state.step_times.quantile(0.5),
        "step_p99": state.step_times.quantile(0.99),
    }
    return {
        name: _spans(incident, struck[index]) | steps
        for index, (name, incident) in enumerate(zip(names, report.incidents, strict=True))
    }


def _struck_at(job: Job) -> dict[int, float]:
    """Return when each fault was about to be carried out, as its agent said just before."""
    entries = journal.read(job.folder.journal.read_bytes()).entries
    return {
        entry.event.fact.index: entry.event.at
        for entry in entries
        if isinstance(entry.event, Reported) and isinstance(entry.event.fact, FaultCarriedOut)
    }


def _spans(incident: IncidentReport, struck_at: float) -> dict[str, float]:
    assert incident.first_step_after_s is not None
    assert incident.decided_after_s is not None
    detected_at = incident.began_s + incident.detected_after_s
    spans = dict.fromkeys(PHASES, 0.0)
    spans |= {phase: s for phase, s in incident.ledger.items() if phase in PHASES}
    spans["detect"] = detected_at - struck_at
    spans["total"] = incident.began_s + incident.first_step_after_s - struck_at
    return spans


def torchrun(root: Path) -> float:
    """Run the job under torchrun, kill a rank; return seconds to the first new step.

    Raises:
        RuntimeError: if it does not come back within `WAIT_S`.
    """
    root.mkdir(parents=True)
    job = root / "job.json"
    run = compose.parse(json.dumps(run_file()), TrainingRun, "bench")
    job.write_bytes(msgspec.json.encode(run.job()))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
        *("--max-restarts", "3", "-m", "trainer.alone", str(job), "--cache", str(root / "cache")),
        *("--save-every", str(SAVE_EVERY), "--saves", str(root / "saves")),
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with (root / "out").open("w") as out:
        started = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        return _kill_one(started, root / "out")
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait(10)


def _kill_one(started: subprocess.Popen[bytes], out: Path) -> float:
    deadline = time.monotonic() + WAIT_S
    while _steps(out)[-1:] < [(CRASH_AT, 0.0)]:
        _bounded(deadline, out)
    victim = _workers(started.pid)[1]
    killed_at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    while True:
        steps = _steps(out)
        again = [
            at
            for (before, _), (step, at) in itertools.pairwise(steps)
            if step <= before and at > killed_at
        ]
        if again:
            return again[0] - killed_at
        _bounded(deadline, out)


def _bounded(deadline: float, out: Path) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError(f"torchrun has not come this far in {WAIT_S:g} s: {out.read_text()}")
    time.sleep(0.005)


def _steps(out: Path) -> list[tuple[int, float]]:
    rows = [line.split() for line in out.read_text().splitlines() if line.startswith("step ")]
    return [(int(row[1]), float(row[3])) for row in rows if len(row) == 8]


def _workers(agent: int) -> list[int]:
    """Return the process ids of torchrun's workers, ascending."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return sorted(int(child) for child in children)


def main() -> None:
    """Measure, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    ours: dict[str, list[dict[str, float]]] = {}
    theirs: list[float] = []
    with ending.new_folder() as folder:
        for number in range(arguments.rounds):
            for name, spans in holdfast(Path(folder) / f"holdfast-{number}").items():
                ours.setdefault(name, []).append(spans)
            theirs.append(torchrun(Path(folder) / f"torchrun-{number}"))
            print(
                f"round {number + 1}/{arguments.rounds}: crash {ours['crash'][-1]['total']:.3f} s, "
                f"freeze {ours['freeze'][-1]['total']:.3f} s, at the default "
                f"{ours['freeze_default'][-1]['total']:.3f} s, "
                f"node loss {ours['node_loss'][-1]['total']:.3f} s, torchrun {theirs[-1]:.3f} s",
                file=sys.stderr,
            )
    result = summary(ours, theirs)
    print(json.dumps(result, indent=2) if arguments.json else text(result))


def summary(ours: dict[str, list[dict[str, float]]], theirs: list[float]) -> dict[str, Any]:
    """Return medians in seconds, the share of each phase, and the ratios."""
    medians = {
        name: {
            phase: statistics.median(spans[phase] for spans in rounds)
            for phase in ("total", "step_p50", "step_p99", *PHASES)
        }
        for name, rounds in ours.items()
    }
    torchrun_s = statistics.median(theirs)
    return {
        "rounds": len(theirs),
        "holdfast_s": medians,
        "torchrun_crash_s": torchrun_s,
        "ratio_torchrun": torchrun_s / medians["crash"]["total"],
        "ratio_node_loss": medians["node_loss"]["total"] / medians["crash"]["total"],
        "freeze_limit_s": DETECT_WITHIN_S + 3 * medians["freeze"]["step_p50"],
        "freeze_default_limit_s": DEFAULT_WITHIN_S + 3 * medians["freeze_default"]["step_p99"],
        "holdfast_crash_all_s": sorted(spans["total"] for spans in ours["crash"]),
        "torchrun_crash_all_s": sorted(theirs),
    }


def text(result: dict[str, Any]) -> str:
    """Return the result for people."""
    lines = [f"median of {result['rounds']} rounds, fault to first new step"]
    for name, spans in result["holdfast_s"].items():
        shares = ", ".join(
            f"{phase} {spans[phase] / spans['total']:.0%}" for phase in PHASES if spans[phase] > 0
        )
        lines.append(f"  {name:<14} {spans['total']:.3f} s  ({shares})")
    lines += [
        f"  torchrun       {result['torchrun_crash_s']:.3f} s after the same kill",
        f"torchrun / holdfast, rank killed:   {result['ratio_torchrun']:.1f} x",
        f"node lost / rank killed:            {result['ratio_node_loss']:.2f} x",
    ]
    for name, allowed in (("freeze", "3 steps + 2 s"), ("freeze_default", "3 x p99 step + 10 s")):
        took_s = result["holdfast_s"][name]["total"]
        lines.append(f"{name}: {took_s:.2f} s; {allowed} are {result[f'{name}_limit_s']:.2f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
