"""What supervision costs a healthy run: the same trainer alone and supervised, paired, in turn.

    python -m tests.bench.overhead [--pairs 20] [--json]

Both jobs are started once and then take turns of some seconds: while one trains, every process of
the other is stopped, so that drifts of the machine, which are far larger than what is looked for,
meet both alike. Supervised means everything on: controller, agents, spare, beacons, a copy of the
state in memory every 5 steps and at a buddy, a durable checkpoint every 20. Alone means torchrun,
and no saves at all. Compared are medians of step times, as the trainer itself measured them, and
the steps that were completed per second, which counts the pauses for saving, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from orchestrator import compose
from orchestrator.core import journal
from orchestrator.core.events import Telemetry
from orchestrator.protocol.runfile import TrainingRun
from tests import runfiles
from tests.bench import ending
from tests.runs import REPOSITORY, Job

WARM_STEPS = 8
WARM_WITHIN_S = 120.0
Steps = Callable[[], list[float]]
"""Returns seconds of every step that was completed so far."""


def run_file() -> dict[str, Any]:
    """Return a job whose step takes more than 0.3 s on two cores."""
    return runfiles.fields(
        "overhead",
        nodes={"count": 2, "ranksPerNode": 1, "spares": 1},
        parallelism={"dpReplicate": 2, "dpShard": 1},
        trainer={"model": "debug", "steps": 100_000, "seqLen": 768, "globalBatch": 4},
        checkpoint={"everySteps": 20, "memoryEverySteps": 5},
    )


class Side:
    """One of the two jobs: a tree of processes that can be stopped as a whole.

    Args:
        root: its first process.
        steps: reads what it has completed.
    """

    def __init__(self, root: subprocess.Popen[str], steps: Steps) -> None:
        self.root, self.steps = root, steps

    def stop(self) -> None:
        """Stop every process. Whoever starts another one meanwhile is met in the next sweep."""
        stopped: set[int] = set()
        while new := set(self._tree()) - stopped:
            self._signal(new, signal.SIGSTOP)
            stopped |= new

    def resume(self) -> None:
        """Let every process go on."""
        self._signal(self._tree(), signal.SIGCONT)

    def warm_up(self) -> None:
        """Wait until it trains; stop it."""
        deadline = time.monotonic() + WARM_WITHIN_S
        while len(self.steps()) < WARM_STEPS:
            if self.root.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.root.args!r} took {len(self.steps())} steps, exit code "
                    f"{self.root.poll()}, expected {WARM_STEPS} within {WARM_WITHIN_S:g} s"
                )
            time.sleep(0.2)
        self.stop()

    def turn(self, seconds: float) -> tuple[list[float], float]:
        """Let it train for a while; return its step times and how long it trained, in seconds."""
        before = len(self.steps())
        begun = time.monotonic()
        self.resume()
        time.sleep(seconds)
        self.stop()
        spent = time.monotonic() - begun
        return self.steps()[before:], spent

    def processor_s(self) -> float:
        """Return what all its processes together have computed so far, seconds."""
        ticks = 0
        for pid in self._tree():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _tree(self) -> list[int]:
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    children.setdefault(parent, []).append(int(entry.name))
        tree = [self.root.pid]
        for pid in tree:
            tree += children.get(pid, [])
        return tree

    @staticmethod
    def _signal(pids: Iterator[int] | set[int] | list[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def supervised(root: Path) -> Iterator[Side]:
    """Start the job under supervision; end it with the block."""
    job = Job(root, run_file())

    def steps() -> list[float]:
        if not job.folder.journal.exists():
            return []
        entries = journal.read(job.folder.journal.read_bytes()).entries
        telemetry = [entry.event for entry in entries if isinstance(entry.event, Telemetry)]
        return [report.seconds for event in telemetry for report in event.reports]

    side = Side(job.start("--quiet"), steps)
    try:
        yield side
        side.resume()
        side.root.send_signal(signal.SIGINT)
        job.finish()
        if job.report().incidents:
            raise RuntimeError(f"supervision was disturbed: {job.report().incidents}")
    finally:
        side.resume()
        job.close()


@contextlib.contextmanager
def alone(root: Path, fields: dict[str, Any] | None = None) -> Iterator[Side]:
    """Start the same trainer under plain torchrun; end it with the block.

    Args:
        root: a folder that is not there yet.
        fields: of its run file; default that of this benchmark.
    """
    root.mkdir(parents=True)
    job = root / "job.json"
    run = compose.parse(json.dumps(fields or run_file()), TrainingRun, "bench")
    job.write_bytes(msgspec.json.encode(run.job()))

    def steps() -> list[float]:
        rows = [line.split() for line in (root / "out").read_text().splitlines()]
        return [float(row[7]) for row in rows if len(row) > 7 and row[0] == "step"]

    with (root / "out").open("w") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(run.world_size), "-m", "trainer.alone", str(job)),
                *("--cache", str(root / "cache")),
            ],
            cwd=REPOSITORY,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
            stdout=out,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    side = Side(process, steps)
    try:
        yield side
    finally:
        side.resume()
        process.terminate()
        process.wait(60)


def main() -> None:
    """Measure, and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--turn", type=float, default=6.0, help="seconds of a turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(ending.new_folder())
        sides = []
        for name, start in (("alone", alone), ("supervised", supervised)):
            sides.append(stack.enter_context(start(Path(folder) / name)))
            sides[-1].warm_up()
        pairs = [_pair(sides, number, arguments) for number in range(arguments.pairs)]
    result = _result(pairs)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"median step: alone {result['alone_step_s']:.3f} s, supervised "
            f"{result['supervised_step_s']:.3f} s; overhead {result['overhead']:+.2%} (median of "
            f"{len(pairs)} pairs, middle half {result['overhead_quartiles'][0]:+.2%} to "
            f"{result['overhead_quartiles'][1]:+.2%}); with pauses for saving "
            f"{result['overhead_whole']:+.2%}"
        )


Turn = tuple[list[float], float]


def _pair(sides: list[Side], number: int, arguments: argparse.Namespace) -> tuple[Turn, Turn]:
    """Let each have a turn. Who goes first changes: the machine may be busier for the second."""
    turns: dict[int, Turn] = {}
    for index in (0, 1) if number % 2 else (1, 0):
        turns[index] = sides[index].turn(arguments.turn)
    alone_s, supervised_s = (statistics.median(turns[index][0]) for index in (0, 1))
    print(
        f"pair {number + 1}/{arguments.pairs}: alone {alone_s:.4f} s, supervised "
        f"{supervised_s:.4f} s, {supervised_s / alone_s - 1:+.2%}",
        file=sys.stderr,
    )
    return turns[0], turns[1]


def _result(pairs: list[tuple[Turn, Turn]]) -> dict[str, Any]:
    medians = [tuple(statistics.median(steps) for steps, _ in pair) for pair in pairs]
    overheads = sorted(supervised_s / alone_s - 1 for alone_s, supervised_s in medians)
    # Steps per second over all turns; the step that a turn cut in two is counted once, later.
    speeds = [
        sum(len(pair[side][0]) for pair in pairs) / sum(pair[side][1] for pair in pairs)
        for side in (0, 1)
    ]
    return {
        "pairs": len(pairs),
        "alone_step_s": statistics.median(alone_s for alone_s, _ in medians),
        "supervised_step_s": statistics.median(supervised_s for _, supervised_s in medians),
        "overhead": statistics.median(overheads),
        "overhead_quartiles": [overheads[len(pairs) // 4], overheads[-1 - len(pairs) // 4]],
        "overhead_all": overheads,
        "overhead_whole": speeds[0] / speeds[1] - 1,
    }


if __name__ == "__main__":
    main()
