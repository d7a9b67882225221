"""How soon a successor stands where the last controller stood, from a snapshot and without.

    python -m tests.bench.takeover [--ticks 20000] [--nodes 64] [--json]

A run of 8 ranks on each node trains for so many ticks, which go into a journal as they would in a
live run. Then it is taken over twice, as `orchestrator.server` does it: from the newest snapshot
and what is behind it, and from the whole journal. Both must know the same, to the byte, else the
exit code is 1. Snapshots are taken as often as in a live run, and their cost is told beside.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from orchestrator import compose
from orchestrator.core import snapshot
from orchestrator.core.controller import Controller
from orchestrator.core.events import Event
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server.counts import Counts
from orchestrator.server.deciding import take_over
from orchestrator.server.journal import JournalFile
from orchestrator.server.snapshots import Snapshots
from orchestrator.worlds.folder import RunFolder
from orchestrator.worlds.told import Told
from tests import runfiles
from tests.bench import ending
from tests.conftest import Cluster

RANKS_PER_NODE = 8


class TooFewError(Exception):
    """There is nothing to go on from in so short a run."""


def run_file(nodes: int) -> str:
    """Return a run of so many nodes, as text."""
    return runfiles.text(
        nodes={"count": nodes, "ranksPerNode": RANKS_PER_NODE, "spares": 0},
        parallelism={"dpReplicate": 1, "dpShard": nodes * RANKS_PER_NODE},
        trainer={"entrypoint": "tests.programs.steps:main", "steps": 1_000_000},
    )


def lived(nodes: int, ticks: int) -> tuple[TrainingRun, list[Event]]:
    """Return a run and what its controller was told in so many ticks of healthy training."""
    cluster = Cluster(run_file(nodes))
    cluster.begin([f"node-{number}" for number in range(nodes)])
    cluster.train(ticks)
    return cluster.run, [entry.event for entry in cluster.entries]


def write(folder: RunFolder, run: TrainingRun, events: list[Event]) -> dict[str, float]:
    """Decide them, put them on record and take snapshots, as a live controller does.

    Raises:
        TooFewError: if no snapshot was due yet.
    """
    controller, told = compose.controller(run), Told()
    file, kept = JournalFile(folder.journal, run), Snapshots(folder.snapshot, run.metadata.name)
    deciding_s = taking_s = 0.0
    taken = 0
    for event in events:
        began = time.perf_counter()
        decisions = controller.handle(event)
        spent_s = time.perf_counter() - began
        told.add(file.append(event, decisions))
        deciding_s += spent_s
        if kept.spent(spent_s, controller.state):
            began = time.perf_counter()
            kept.take(controller, file, told.entries(), Counts())
            taking_s += time.perf_counter() - began
            taken += 1
    file.close()
    if not taken:
        raise TooFewError(
            f"no snapshot was due within {len(events)} events, decided in {deciding_s:.2f} s: "
            "ask for more --ticks"
        )
    return {
        "snapshots": taken,
        "snapshot_mb": folder.snapshot.stat().st_size / 1e6,
        "share_of_deciding": taking_s / deciding_s,
    }


def timed(folder: RunFolder, run: TrainingRun) -> tuple[float, int, Controller]:
    """Take over; return how long that took, how many events were replayed, and who decides."""
    began = time.perf_counter()
    taken = take_over(folder, run)
    spent_s = time.perf_counter() - began
    taken.file.close()
    return spent_s, len(taken.file.entries), taken.controller


def measure(root: Path, nodes: int, ticks: int) -> dict[str, float]:
    """Return what was measured."""
    folder = RunFolder(root)
    run, events = lived(nodes, ticks)
    found = write(folder, run, events)
    quick_s, behind, quick = timed(folder, run)
    folder.snapshot.unlink()
    whole_s, everything, whole = timed(folder, run)
    return {
        "ranks": float(run.world_size),
        "events": float(everything),
        "replayed_behind_the_snapshot": float(behind),
        "from_snapshot_s": quick_s,
        "from_journal_s": whole_s,
        "journal_over_snapshot": whole_s / quick_s,
        "same": float(snapshot.take(quick) == snapshot.take(whole)),
        **found,
    }


def main() -> int:
    """Measure, print, and return the exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--ticks", type=int, default=20_000)
    options.add_argument("--nodes", type=int, default=64)
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args()
    with ending.new_folder() as folder:
        try:
            found = measure(Path(folder), chosen.nodes, chosen.ticks)
        except TooFewError as error:
            options.error(str(error))
    if chosen.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"  {name.replace('_', ' '):<32}{value:12.4g}")
    return 0 if found["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
