"""What it costs to add gradients up in one order: deterministic against fast reduction, in turn.

    python -m tests.bench.reduction [--rounds 8] [--turn 4] [--json]

The same job three times, without supervision, on 2 ranks (2 replicas) and on 4 (2 replicas of 2
shards): with fast reduction and the whole share of a rank at once, which is the default; with fast
reduction and micro-batches of 1; and deterministic, whose micro-batches are 1. Jobs take turns of
some seconds while the others are stopped, so that drifts of the machine meet all alike. Compared
are the processor time per step, which other work on the machine hardly changes, and the median step
time of each turn, without the step that the turn before cut in two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests import runfiles
from tests.bench import ending
from tests.bench.overhead import Side, alone

WORLDS = {
    "2 ranks, 2 replicas": {"dpReplicate": 2, "dpShard": 1},
    "4 ranks, 2 replicas of 2 shards": {"dpReplicate": 2, "dpShard": 2},
}
STEPS_MIN = 3
JOBS: dict[str, dict[str, Any]] = {
    "fast": {},
    "fast, microBatch 1": {"microBatch": 1},
    "deterministic": {"reduction": "deterministic"},
}


def run_file(cut: dict[str, int], trainer: dict[str, Any]) -> dict[str, Any]:
    """Return a job of 8 samples of 128 tokens a step."""
    ranks = cut["dpReplicate"] * cut["dpShard"]
    settings = {"model": "debug", "steps": 100_000, "seqLen": 128, "globalBatch": 8, **trainer}
    nodes = {"count": 1, "ranksPerNode": ranks, "spares": 0}
    return runfiles.fields("reduction", nodes=nodes, parallelism=cut, trainer=settings)


def measure(cut: dict[str, int], folder: Path, rounds: int, turn_s: float) -> dict[str, Any]:
    """Return medians of step times, seconds, and what deterministic reduction takes longer."""
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        for number, (name, trainer) in enumerate(JOBS.items()):
            fields = run_file(cut, trainer)
            sides[name] = stack.enter_context(alone(folder / f"job-{number}", fields))
            sides[name].warm_up()
        table = [_turns(sides, number, turn_s) for number in range(rounds)]
    step_s = {name: statistics.median(row[name].step_s for row in table) for name in JOBS}
    processor_s = {
        name: sum(row[name].processor_s for row in table) / sum(row[name].steps for row in table)
        for name in JOBS
    }
    return {
        "step_s": step_s,
        "processor_s": processor_s,
        "ratio": {
            name: {
                "processor": processor_s["deterministic"] / processor_s[name],
                "step": statistics.median(
                    row["deterministic"].step_s / row[name].step_s for row in table
                ),
            }
            for name in JOBS
            if name != "deterministic"
        },
    }


class Turn(NamedTuple):
    """What a job did in its turn."""

    steps: int
    step_s: float
    """The median."""
    processor_s: float
    """Of all its processes."""


def _turns(sides: dict[str, Side], number: int, turn_s: float) -> dict[str, Turn]:
    """Let each have a turn, in an order that rotates."""
    names = list(sides)
    first = number % len(names)
    turns = {name: _turn(sides[name], turn_s) for name in names[first:] + names[:first]}
    words = ", ".join(f"{name} {turns[name].step_s:.4f} s" for name in names)
    print(f"round {number + 1}: {words}", file=sys.stderr)
    return turns


def _turn(side: Side, turn_s: float) -> Turn:
    before = side.processor_s()
    steps: list[float] = []
    while len(steps) < STEPS_MIN:  # a busy machine may need longer
        steps += side.turn(turn_s)[0]
    return Turn(len(steps), statistics.median(steps[1:]), side.processor_s() - before)


def main() -> None:
    """Measure both worlds, and print step times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turn", type=float, default=4.0, help="seconds of a turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    results = {}
    for number, (name, cut) in enumerate(WORLDS.items()):
        with ending.new_folder() as folder:
            place = Path(folder) / str(number)
            results[name] = measure(cut, place, arguments.rounds, arguments.turn)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for world, result in results.items():
        for name, ratio in result["ratio"].items():
            print(
                f"{world}: deterministic takes {ratio['processor']:.2f} times the processor time "
                f"of {name} ({result['processor_s']['deterministic']:.3f} s a step against "
                f"{result['processor_s'][name]:.3f} s), {ratio['step']:.2f} times as long"
            )


if __name__ == "__main__":
    main()
