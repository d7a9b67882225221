"""What looking for silent corruption costs a healthy run: with it as by default against without.

    python -m tests.bench.detection [--pairs 16] [--stretch 40] [--dim 128 --layers 4] [--json]

Three replicas train on the CPU the `debug` model, or one of other sizes, in one world each for all
that looks in every step, or in some, as by default; for digests alone, for updates that are done
twice, and for norms in which outliers would show, with what is read twice and added up; and for
replays. Steps are taken in stretches, with and without; which comes first changes from pair to
pair, so that drifts of the machine meet both alike. What has its turn in some steps only is in a
stretch as often as in a run. A step is as long as its slowest rank says.
Before that, worlds take as many steps as it takes them to know what looks cost them, and settle.
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
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from orchestrator.campaign.job import usual
from orchestrator.campaign.world import LiveWorld
from orchestrator.protocol.runfile import Detection, TrainingRun
from orchestrator.protocol.trials import Quiet, Return, Train
from tests.bench import ending
from trainer.digest import digest
from trainer.replay import COSTS, Pace
from trainer.shares import Place, share_of

WARM_STEPS = 64
"""In which turns come to be as they stay: of digests, once all has been looked at some times."""
FEWER = 3
"""Pairs of a part, against those of the whole."""
NEARLY_NEVER = 1e-9
WORDS = 1 << 24
NORMAL_95 = 1.96


class Sizes(NamedTuple):
    """Of the model, its width and its depth."""

    dim: int
    layers: int

    @property
    def model(self) -> str | dict[str, int]:
        """As a run file has it."""
        if self == DEBUG:
            return "debug"
        heads = self.dim // 64
        return {
            "dim": self.dim,
            "layers": self.layers,
            "heads": heads,
            "kvHeads": heads,
            "ffnDim": 3 * self.dim,
            "vocab": 1280,
        }


DEBUG = Sizes(128, 4)


def run(sizes: Sizes, **detection: float) -> TrainingRun:
    """Return the job that is trained, with other settings of what looks for corruption."""
    found = usual()
    settings = msgspec.structs.replace(found.spec.detection, **detection)
    trainer = msgspec.structs.replace(found.spec.trainer, model=sizes.model)
    spec = msgspec.structs.replace(found.spec, detection=settings, trainer=trainer)
    return msgspec.structs.replace(found, spec=spec)


class Added(NamedTuple):
    """What looking adds to a step, as a share of it, once for each pair of stretches."""

    step: list[float]
    """Of its time."""
    processor: list[float]
    """Of the processor time of all ranks, which other work on the machine hardly changes."""
    step_s: list[float]
    """What a step takes without."""


def added(job: TrainingRun, folder: Path, pairs: int, stretch: int, warm: int) -> Added:
    """Take pairs of stretches of steps, with detectors and without."""
    (folder / "tokens").mkdir(parents=True)
    found = Added([], [], [])
    with LiveWorld(job, folder / "world", folder / "tokens") as world:
        world.order(Train(steps=warm, snapshot=0))
        world.order(Return(snapshot=0, generation=world.next_generation()))
        for number in range(pairs):
            took, used = {}, {}
            for looks in (number % 2 == 0, number % 2 == 1):
                before_s = processor_s()
                said = world.order(Quiet(steps=stretch, detectors=looks))
                used[looks] = processor_s() - before_s
                took[looks] = max(math.fsum(each.seconds) for each in said)
            world.listen(float(number))
            found.step.append(took[True] / took[False] - 1)
            found.processor.append(used[True] / used[False] - 1)
            found.step_s.append(took[False] / stretch)
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


def total(always: list[float], replays: list[float], apart: int) -> dict[str, float]:
    """Return what all that looks always and, once in `apart` steps, replays add."""
    looks, once = interval(always), interval(replays)
    return {name: looks[name] + once[name] / apart for name in looks}


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


def measure(
    folder: Path, sizes: Sizes, pairs: int, stretch: int, warm: int, *, parts: bool
) -> dict[str, Any]:
    """Return shares of a step's time, speeds, and how busy the machine was with anything."""
    none = {"digest_share": 0.0, "update_share": 0.0, "replay_share": 0.0}
    default = Detection()
    digests = {"digest_share": default.digest_share}
    updates = {"update_share": default.update_share}
    norms = {"replay_share": NEARLY_NEVER}

    def looking(name: str, shares: dict[str, float], pairs: int, steps: int = stretch) -> Added:
        found = added(run(sizes, **none | shares), folder / name, pairs, steps, warm)
        # It takes minutes, and whoever stops it is to have what there is.
        print(f"{name} {interval(found.step)} {interval(found.processor)}", file=sys.stderr)
        return found

    always = looking("always", digests | updates | norms, pairs)
    replay = looking("replays", {"replay_share": 1.0}, 2 * pairs, 1)
    each = {"replay": replay}
    if parts:
        fewer = max(pairs // FEWER, 2)
        each |= {
            "digests": looking("digests", digests, fewer),
            "updates": looking("updates", updates, fewer),
            "outliers": looking("outliers", norms, fewer),
        }
    apart = steps_apart(statistics.median(replay.step))
    return {
        "overhead": total(always.step, replay.step, apart),
        "overhead_processor": total(always.processor, replay.processor, apart),
        "always": interval(always.step),
        "always_processor": interval(always.processor),
        **{name: interval(part.step) for name, part in each.items()},
        **{f"{name}_processor": interval(part.processor) for name, part in each.items()},
        "replay_every_steps": apart,
        "step_s": statistics.median(always.step_s),
        **speeds(),
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "pairs": pairs,
        "stretch": stretch,
    }


def main() -> None:
    """Measure, and print shares of a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=16, help="of all together; parts have fewer")
    parser.add_argument("--stretch", type=int, default=40, help="steps with, and then without")
    parser.add_argument("--warm", type=int, default=WARM_STEPS, help="steps before")
    parser.add_argument("--whole", action="store_true", help="nothing by itself but replays")
    parser.add_argument("--dim", type=int, default=DEBUG.dim, help="of the model")
    parser.add_argument("--layers", type=int, default=DEBUG.layers, help="of the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with ending.new_folder() as folder:
        sizes = Sizes(arguments.dim, arguments.layers)
        how = (arguments.pairs, arguments.stretch, arguments.warm)
        found = measure(Path(folder), sizes, *how, parts=not arguments.whole)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name in ("overhead", "always", "digests", "updates", "outliers", "replay"):
        if name not in found:
            continue
        for unit, one in (("time", found[name]), ("processor time", found[f"{name}_processor"])):
            told = f"{one['median']:+.2%} ({one['low']:+.2%} to {one['high']:+.2%})"
            print(f"{name} {told} of a step's {unit}")
    print(f"of replays, one in {found['replay_every_steps']} steps counts")
    digested, copied = found["digest_gb_s"], found["copy_gb_s"]
    print(f"a core digests {digested:.2f} GB/s and copies {copied:.2f} GB/s")
    print(f"a step takes {1e3 * found['step_s']:.1f} ms without")
    print(f"load {found['load']:.1f} on {found['cores']} cores", file=sys.stderr)


if __name__ == "__main__":
    main()
