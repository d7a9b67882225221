"""What a controller costs that has 2,048 agents, and how soon they have an order.

    python -m tests.bench.controller [--agents 2048] [--simulated 16384] [--seconds 30] [--json]
        [--strict]

The controller is the process that `holdfast run` keeps alive, with its server, journal and core.
The agents of 8 ranks each are connections of 8 other processes on loopback (tests/programs/crowd):
channel and account of real agents, ranks in name only. All share the processors of this machine.
Then the same core decides for 16,384 agents in virtual time, looked at as often, without any
connection. With --agents 0 that is all.

Measured are processor time and memory of the controller while agents beat every 2 s; how long after
a rank was killed every agent had its order to begin again; how long after the controller was
killed all agents were back; and how long after it was killed between an order and its delivery to
all of them the rest had it. In the end the journal must have all that it had when the controller
was killed, must decide the same when it is replayed, byte for byte, and every agent must be where
the last order put it; else the exit code is 1. With --strict so it is if a target is missed, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from orchestrator import compose
from orchestrator.core.controller import Controller
from orchestrator.core.decisions import Decision
from orchestrator.core.events import Event, Telemetry
from orchestrator.protocol.ids import Seconds
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.simulation.drive import Simulation
from orchestrator.worlds.simulated.world import SimulatedWorld
from tests import runfiles
from tests.bench import ending
from tests.crowds import Side, side
from tests.simulated import LOCAL, constant

RANKS_PER_NODE = 8
PROCESSES = 8
STEP_S = 5.0
SAVE_EVERY = 6
"""Steps. Twice a minute, as `holdfast plan interval` advises for 16,384 GPUs."""
SETTLE_S = 4.0
WAIT_S = 120.0
ON_ITS_WAY_S = 0.5
"""What a controller sent before it was killed arrives within that; nobody succeeds it before."""
SIMULATED_S = 60.0
TARGETS = {
    "cpu_cores": 0.15,
    "rss_mb": 300.0,
    "order_s": 2.0,
    "simulated_cores": 1.0,
}
"""At most so much: of 2,048 live agents, and of 16,384 simulated ones."""


def run_file(agents: int) -> TrainingRun:
    """Return a run of so many nodes, whose agents beat every 2 s."""
    fields = runfiles.fields(
        "crowd",
        nodes={"count": agents, "ranksPerNode": RANKS_PER_NODE},
        parallelism={"tp": RANKS_PER_NODE},
        trainer={"entrypoint": "tests.programs.steps:main", "steps": 1_000_000},
        checkpoint={"everySteps": 1_000_000, "memoryEverySteps": SAVE_EVERY},
        # A busy machine may keep a process of the crowd from running for seconds.
        detection={"detectWithin": "60s"},
    )
    return compose.parse(json.dumps(fields), TrainingRun, "bench")


def live(root: Path, run: TrainingRun, seconds: float) -> dict[str, Any]:
    """Measure a real controller."""
    with side(root, run, PROCESSES, STEP_S) as there:
        begun = time.monotonic()
        status = there.until_training(1, WAIT_S)
        found: dict[str, Any] = {
            "agents": there.agents,
            "connections_per_process": there.crowd.sizes,
            "start_s": status.begun_at - begun,
        }
        say(f"{there.agents} agents train {found['start_s']:.1f} s after the start")
        there.let(SETTLE_S)
        found |= steady(there, seconds)
        found["order_s"] = order(there)
        there.let(SETTLE_S)
        killed_at, first = there.kill_controller()
        status = there.until_training(2, WAIT_S)
        found["back_s"] = status.connected_at - killed_at
        found["known_s"] = there.until_known(first, WAIT_S) - killed_at
        say(f"all back {found['back_s']:.1f} s after the controller was killed")
        there.let(SETTLE_S)
        found["successor_rss_mb"] = there.usage().rss_mb
        second = between(there, found)
        there.let(SETTLE_S)
        found["problems"] = there.problems([first, second])
        found["journal_mb"] = there.folder.journal.stat().st_size / 1e6
    return found


def steady(there: Side, seconds: float) -> dict[str, float]:
    """Measure while agents beat, and nothing else happens."""
    before, others = there.usage(), there.crowd.status().cpu_s
    size = there.folder.journal.stat().st_size
    there.let(seconds)
    after = there.usage()
    spent_s = after.at - before.at
    cpu_cores = (after.cpu_s - before.cpu_s) / spent_s
    say(f"{cpu_cores:.3f} cores, {after.rss_mb:.0f} MB for {spent_s:.0f} s")
    return {
        "cpu_cores": cpu_cores,
        "rss_mb": after.rss_mb,
        "crowd_cores": (there.crowd.status().cpu_s - others) / spent_s,
        "journal_mb_per_hour": (there.folder.journal.stat().st_size - size) / spent_s * 3.6e-3,
        "seconds": spent_s,
    }


def order(there: Side) -> float:
    """Return how long after the death of a rank the last agent had its order to begin again."""
    lost_at = there.crowd.lose_first_rank()
    status = there.until_training(2, WAIT_S)
    say(f"all had an order {status.begun_at - lost_at:.2f} s after a rank was killed")
    return status.begun_at - lost_at


def between(there: Side, found: dict[str, Any]) -> bytes:
    """Kill the controller when an order has reached some; return what it had on record by then."""
    there.crowd.lose_first_rank()
    there.until("some begin anew", lambda now: now.generation == 3, WAIT_S)
    killed_at, on_record = there.kill_controller()
    time.sleep(ON_ITS_WAY_S)
    found["without_order"] = there.agents - there.crowd.status().begun
    status = there.until_training(3, WAIT_S)
    found["caught_up_s"] = status.begun_at - killed_at
    say(
        f"{found['without_order']} agents had no order; after {found['caught_up_s']:.1f} s they had"
    )
    return on_record


class Sample(NamedTuple):
    """A moment of a simulation."""

    at: Seconds
    cpu_s: float


class Stopwatch:
    """Notes what each tick of a simulation has cost."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def __call__(self, controller: Controller, event: Event, decisions: Sequence[Decision]) -> None:
        """See `Checker`."""
        if isinstance(event, Telemetry) and controller.state.reached_step > 0:
            self.samples.append(Sample(event.at, time.process_time()))


def simulated(run: TrainingRun, seconds: float) -> dict[str, float]:
    """Return what the core costs that decides for simulated agents while they train."""
    profile = msgspec.structs.replace(LOCAL, step=constant(STEP_S))
    world = SimulatedWorld(
        run,
        compose.check(run, "bench"),
        profile,
        chance=np.random.Generator(np.random.Philox(0)),
    )
    watch = Stopwatch()
    Simulation(run, world, checkers=[watch]).conduct(Seconds(seconds))
    first, last = watch.samples[0], watch.samples[-1]
    spent_s = last.at - first.at
    return {
        "simulated_cores": (last.cpu_s - first.cpu_s) / spent_s,
        "simulated_ticks_per_s": (len(watch.samples) - 1) / spent_s,
        "simulated_agents": run.spec.nodes.count,
    }


def say(text: str) -> None:
    """Tell whoever waits how far it is."""
    print(text, file=sys.stderr, flush=True)


def text(found: dict[str, Any]) -> str:
    """Return the result for people."""
    rows = [
        ("processor time of the controller", "cpu_cores", "cores"),
        ("its memory (RSS)", "rss_mb", "MB"),
        ("rank killed until all have the order", "order_s", "s"),
        ("controller killed until all are back", "back_s", "s"),
        ("and that is on record", "known_s", "s"),
        ("agents without an order when killed", "without_order", ""),
        ("controller killed until they have it", "caught_up_s", "s"),
        ("memory of its successor", "successor_rss_mb", "MB"),
        ("journal, while agents beat", "journal_mb_per_hour", "MB/h"),
        ("processor time of the crowd", "crowd_cores", "cores"),
        ("the same core, simulated agents", "simulated_cores", "cores"),
    ]
    lines = [f"a beat every 2 s of each agent, {RANKS_PER_NODE} ranks"]
    if "agents" in found:
        sizes = found["connections_per_process"]
        spread = f"connections of {len(sizes)} processes, {min(sizes)} to {max(sizes)} each"
        lines.append(f"{found['agents']} live agents; {spread}")
    lines.append(f"{found['simulated_agents']} simulated agents")
    for label, name, unit in [row for row in rows if row[1] in found]:
        target = f"  at most {TARGETS[name]:g}" if name in TARGETS else ""
        lines.append(f"  {label:<42}{found[name]:10.4f} {unit:<6}{target}")
    lines += [f"LOST: {problem}" for problem in found["problems"][:20]]
    if "agents" in found and not found["problems"]:
        lines.append("no decision was lost: the journal is whole and replays byte for byte")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and return the exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--agents", type=int, default=2048, help="live ones; 0 for none")
    options.add_argument("--simulated", type=int, default=16_384, help="agents in virtual time")
    options.add_argument("--seconds", type=float, default=30.0, help="of steady beating")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    chosen = options.parse_args()
    found: dict[str, Any] = {"problems": []}
    if chosen.agents:
        with ending.new_folder() as folder:
            found |= live(Path(folder), run_file(chosen.agents), chosen.seconds)
    found |= simulated(run_file(chosen.simulated), SIMULATED_S)
    found["targets"] = TARGETS
    found["missed"] = [n for n, most in TARGETS.items() if n in found and found[n] > most]
    print(json.dumps(found, indent=2) if chosen.json else text(found))
    return int(bool(found["problems"]) or (chosen.strict and bool(found["missed"])))


if __name__ == "__main__":
    sys.exit(main())
