"""What supervision costs a healthy run: the same trainer alone and supervised, paired, in turn.

    python -m tests.bench.overhead [--rounds 5] [--json]

Supervised means everything on: agents, controller, spare, beacons, a copy of the state in memory
every 5 steps and at a buddy, a durable checkpoint every 20. Alone means torchrun and no saves.
Compared are medians of step times, each as the trainer itself measured it, the first five left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from orchestrator import compose
from orchestrator.core import journal
from orchestrator.core.events import Telemetry
from orchestrator.protocol.runfile import TrainingRun
from tests.runs import REPOSITORY, Job

STEPS, SKIPPED = 45, 5
WAIT_S = 240.0


def run_file() -> dict[str, Any]:
    """Return a job whose step takes more than 0.3 s on two cores."""
    return {
        "apiVersion": "holdfast.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "overhead"},
        "spec": {
            "nodes": {"count": 2, "ranksPerNode": 1, "spares": 1},
            "parallelism": {"dpReplicate": 2, "dpShard": 1},
            "trainer": {"model": "debug", "steps": STEPS, "seqLen": 512, "globalBatch": 4},
            "checkpoint": {"everySteps": 20, "memoryEverySteps": 5},
        },
    }


def supervised(root: Path) -> tuple[list[float], float]:
    """Return step times in seconds, and the share of the time that saving kept training waiting."""
    job = Job(root, run_file())
    code, report = job.conduct("--quiet", timeout_s=WAIT_S)
    if code != 0 or report.incidents:
        raise RuntimeError(f"run ended with {code}, {report.incidents}: {job.output()}")
    entries = journal.read(job.folder.journal.read_bytes()).entries
    reports = {
        r.step: r.seconds
        for entry in entries
        if isinstance(entry.event, Telemetry)
        for r in entry.event.reports
    }
    stall_s = report.ledger["checkpoint_stall"]
    return (
        [seconds for step, seconds in sorted(reports.items()) if step > SKIPPED],
        stall_s / (stall_s + report.ledger["effective"]),
    )


def alone(root: Path) -> list[float]:
    """Return step times of the same trainer under plain torchrun, in seconds."""
    root.mkdir(parents=True)
    job = root / "job.json"
    run = compose.parse(json.dumps(run_file()), TrainingRun, "bench")
    job.write_bytes(msgspec.json.encode(run.job()))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(run.world_size), "-m", "trainer.alone", str(job)),
            *("--cache", str(root / "cache")),
        ],
        cwd=REPOSITORY,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("step ")]
    return [float(row[7]) for row in rows if int(row[1]) > SKIPPED]


def main() -> None:
    """Measure, and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    pairs: list[tuple[float, float]] = []
    stalls: list[float] = []
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        for number in range(arguments.rounds):
            # Who goes first changes: the machine may be warmer, or busier, for the second.
            order = (0, 1) if number % 2 else (1, 0)
            medians = [0.0, 0.0]
            for side in order:
                root = Path(folder) / f"{number}-{side}"
                if side == 0:
                    medians[0] = statistics.median(alone(root))
                else:
                    steps, stall = supervised(root)
                    medians[1] = statistics.median(steps)
                    stalls.append(stall)
            pairs.append((medians[0], medians[1]))
            print(
                f"round {number + 1}/{arguments.rounds}: alone {medians[0]:.4f} s, "
                f"supervised {medians[1]:.4f} s, {medians[1] / medians[0] - 1:+.2%}",
                file=sys.stderr,
            )
    result = {
        "rounds": len(pairs),
        "alone_step_s": statistics.median(a for a, _ in pairs),
        "supervised_step_s": statistics.median(s for _, s in pairs),
        "overhead": statistics.median(s / a for a, s in pairs) - 1,
        "overhead_all": sorted(s / a - 1 for a, s in pairs),
        "stall_share": statistics.median(stalls),
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"median step: alone {result['alone_step_s']:.3f} s, supervised "
            f"{result['supervised_step_s']:.3f} s; overhead {result['overhead']:+.2%} (median of "
            f"{len(pairs)} pairs); saving stalls {result['stall_share']:.2%} of training"
        )


if __name__ == "__main__":
    main()
