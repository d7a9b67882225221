"""Whether a healthy run is ever taken for a broken one while the processors are busy elsewhere.

    python -m tests.bench.false_alarms [--steps 2000] [--json]

Runs a tiny Llama at `detectWithin: 2s` beside a process that uses one core in bursts, without any
fault. Exit code 1 if there was an incident.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import runfiles
from tests.bench import ending
from tests.runs import Job

NOISE = """
import time
while True:
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        pass
    time.sleep(0.3)
"""
WAIT_S = 1800.0


def run_file(steps: int) -> dict[str, Any]:
    """Return a job with short steps, so that many of them fit into a few minutes."""
    model = {"dim": 32, "layers": 1, "heads": 2, "kvHeads": 1, "ffnDim": 64, "vocab": 1280}
    return runfiles.fields(
        "noise",
        trainer={"model": model, "steps": steps, "seqLen": 32, "globalBatch": 4},
        checkpoint={"everySteps": 200, "memoryEverySteps": 20},
        detection={"detectWithin": "2s"},
    )


def main() -> int:
    """Run, print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    noise = subprocess.Popen([sys.executable, "-c", NOISE])
    try:
        with ending.new_folder() as folder:
            code, report = Job(Path(folder), run_file(arguments.steps)).conduct(
                "--quiet", timeout_s=WAIT_S
            )
    finally:
        noise.kill()
        noise.wait(10)
    result = {
        "steps": report.final_step,
        "state": report.state,
        "incidents": [f"{i.kind}: {i.evidence}; {i.reason}" for i in report.incidents],
        "wall_s": report.wall_s,
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{report.final_step} healthy steps, {len(report.incidents)} incidents")
        print("\n".join(result["incidents"]))
    return int(code != 0 or bool(report.incidents))


if __name__ == "__main__":
    sys.exit(main())
