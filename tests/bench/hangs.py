"""How soon hangs are found, how often the culprit is named alone, and how often nobody hung.

    python -m tests.bench.hangs [--steps 10000] [--hangs 60] [--json]

Simulated times of steps, waits, saves, evaluations, recompiling and shut laptops (tests/noise.py),
steps of 0.3, 2 and 20 s, and the real controller. Exit code 1 if a world was ended for nothing, a
culprit was not named alone, or more than one hang in 20 took longer than three steps and 10 s.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from tests.noise import Trial

STEPS_S = (0.3, 2.0, 20.0)


def main() -> int:
    """Run, print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="in all (default 10000)")
    parser.add_argument("--hangs", type=int, default=60, help="in all (default 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    each = max(arguments.hangs // len(STEPS_S), 1)
    rows = []
    for number, step_s in enumerate(STEPS_S):
        trial = Trial(step_s, arguments.seed + number)
        found = []
        for _ in range(each):
            trial.train(-(-arguments.steps // (each * len(STEPS_S))))
            found.append(trial.hang())
        waited_s = [one.waited_s for one in found]
        rows.append(
            {
                "step_s": step_s,
                "steps": trial.steps,
                "false_kills": trial.false_kills,
                "hangs": len(found),
                "exact": sum(one.exact for one in found),
                "p95_s": float(np.quantile(waited_s, 0.95)),
                "within_s": found[0].within_s,
            }
        )
        if not arguments.json:
            print(", ".join(f"{name} {value:g}" for name, value in rows[-1].items()), flush=True)
    if arguments.json:
        print(json.dumps(rows))
    good = all(
        row["false_kills"] == 0 and row["exact"] == row["hangs"] and row["p95_s"] <= row["within_s"]
        for row in rows
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
