"""What looking for silent corruption costs a healthy run: with it as by default against without.

    python -m tests.bench.detection [--pairs 60] [--json]

Three replicas of the `debug` model train on the CPU, in one world each for digests, for updates
that are done twice, for norms in which outliers would show, and for those and replays.
Every other step is taken without; which comes first changes from pair to pair, so that drifts of
the machine meet both alike. A step is as long as its slowest rank says. Digests are as by default.
Replays, which by default come once in many steps, are measured in each and counted once in so many
as a run would come to that sees them cost what they cost here.
Given are medians over pairs of what is added to a step, as a share, with 95 % intervals that assume
nothing of how they are spread; of the sum, both ends are added up, which makes it wider than it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from orchestrator.campaign.job import usual
from orchestrator.campaign.world import LiveWorld
from orchestrator.protocol.runfile import Detection, TrainingRun
from orchestrator.protocol.trials import Quiet, Return, Train
from trainer.digest import digest
from trainer.replay import COSTS, Pace
from trainer.shares import Place, share_of

WARM_STEPS = 3
NEARLY_NEVER = 1e-9
WORDS = 1 << 24
NORMAL_95 = 1.96


def run(**detection: float) -> TrainingRun:
    """Return the job that is trained, with other settings of what looks for corruption."""
    found = usual()
    settings = msgspec.structs.replace(found.spec.detection, **detection)
    return msgspec.structs.replace(
        found, spec=msgspec.structs.replace(found.spec, detection=settings)
    )


class Added(NamedTuple):
    """What looking adds to a step, as a share of it, once for each pair of steps."""

    step: list[float]
    """Of its time."""
    processor: list[float]
    """Of the processor time of all ranks, which other work on the machine hardly changes."""


def added(job: TrainingRun, folder: Path, pairs: int) -> Added:
    """Take pairs of steps, with detectors and without."""
    (folder / "tokens").mkdir(parents=True)
    found = Added([], [])
    with LiveWorld(job, folder / "world", folder / "tokens") as world:
        world.order(Train(steps=WARM_STEPS, snapshot=0))
        world.order(Return(snapshot=0, generation=world.next_generation()))
        for number in range(pairs):
            took, used = {}, {}
            for looks in (number % 2 == 0, number % 2 == 1):
                before_s = processor_s()
                said = world.order(Quiet(steps=1, detectors=looks))
                used[looks] = processor_s() - before_s
                took[looks] = max(math.fsum(each.seconds) for each in said)
            world.listen(float(number))
            found.step.append(took[True] / took[False] - 1)
            found.processor.append(used[True] / used[False] - 1)
    return found


def processor_s() -> float:
    """Return for how long descendants of this process, with all their threads, have computed."""
    spent_ns, tree = 0, [os.getpid()]
    for pid in tree:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            tree += map(int, (thread / "children").read_text(encoding="ascii").split())
            if pid != tree[0]:
                spent_ns += int((thread / "schedstat").read_text(encoding="ascii").split()[0])
    return 1e-9 * spent_ns


def interval(values: list[float]) -> dict[str, float]:
    """Return the median with its 95 % interval, from the order of values alone.

    >>> interval([float(value) for value in range(100)])
    {'median': 49.5, 'low': 40.0, 'high': 59.0}
    """
    ordered = sorted(values)
    below = max(math.floor((len(values) - NORMAL_95 * math.sqrt(len(values))) / 2), 0)
    return {
        "median": statistics.median(ordered),
        "low": ordered[below],
        "high": ordered[-1 - below],
    }


def total(parts: list[list[float]], apart: int) -> dict[str, float]:
    """Return what digests, updates, outliers and, once in `apart` steps, replays add."""
    digests, updates, outliers, replays = map(interval, parts)
    other = {"median": "median", "low": "high", "high": "low"}
    return {
        name: digests[name]
        + updates[name]
        + outliers[name]
        + (replays[name] - outliers[other[name]]) / apart
        for name in digests
    }


def speeds(rounds: int = 7) -> dict[str, float]:
    """Return GB/s at which one core digests a tensor in memory, and copies one."""
    torch.set_num_threads(1)
    tensor, other = torch.ones(WORDS), torch.empty(WORDS)
    took: dict[str, list[float]] = {"digest_gb_s": [], "copy_gb_s": []}
    for _ in range(rounds):
        begun = time.thread_time()
        digest(tensor, "w")
        between = time.thread_time()
        other.copy_(tensor)
        took["digest_gb_s"].append(between - begun)
        took["copy_gb_s"].append(time.thread_time() - between)
    return {name: 4e-9 * WORDS / statistics.median(seconds) for name, seconds in took.items()}


def steps_apart(cost: float) -> int:
    """Return in how many steps a run has one replay, by default, that sees them cost so much."""
    layout = usual().layout
    first = Place(0, layout.dp_replicate, 0, layout.dp_shard)
    pace = Pace(Detection().replay_share, share_of(usual().spec.trainer, first))
    for _ in range(COSTS):
        pace.paid([cost])
    return pace.every


def measure(folder: Path, pairs: int) -> dict[str, Any]:
    """Return shares of a step's time, speeds, and how busy the machine was with anything."""
    none = {"digest_share": 0.0, "update_share": 0.0, "replay_share": 0.0}
    default = Detection()

    def looking(name: str, **shares: float) -> Added:
        return added(run(**none | shares), folder / name, pairs)

    digests = looking("digests", digest_share=default.digest_share)
    updates = looking("updates", update_share=default.update_share)
    outliers = looking("norms", replay_share=NEARLY_NEVER)
    replays = looking("replays", replay_share=1.0)
    apart = steps_apart(statistics.median(replays.step))
    parts = {"digests": digests, "updates": updates, "outliers": outliers, "replay": replays}
    return {
        "overhead": total([part.step for part in parts.values()], apart),
        "overhead_processor": total([part.processor for part in parts.values()], apart),
        **{name: interval(part.step) for name, part in parts.items()},
        **{f"{name}_processor": interval(part.processor) for name, part in parts.items()},
        "replay_every_steps": apart,
        **speeds(),
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "pairs": pairs,
    }


def main() -> None:
    """Measure, and print shares of a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        found = measure(Path(folder), arguments.pairs)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name in ("overhead", "digests", "updates", "outliers", "replay"):
        for unit, one in (("time", found[name]), ("processor time", found[f"{name}_processor"])):
            told = f"{one['median']:+.2%} ({one['low']:+.2%} to {one['high']:+.2%})"
            print(f"{name} {told} of a step's {unit}")
    print(f"of replays, one in {found['replay_every_steps']} steps counts")
    digested, copied = found["digest_gb_s"], found["copy_gb_s"]
    print(f"a core digests {digested:.2f} GB/s and copies {copied:.2f} GB/s")
    print(f"load {found['load']:.1f} on {found['cores']} cores", file=sys.stderr)


if __name__ == "__main__":
    main()
