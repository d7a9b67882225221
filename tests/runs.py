"""Runs whole jobs through the command line, with or without torch, and cleans up behind them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from orchestrator.core import journal
from orchestrator.core.report import Report
from orchestrator.simulation import checkers
from orchestrator.worlds.folder import RunFolder
from orchestrator.worlds.memory import memory_of
from tests import runfiles
from tests.programs.played import restores

REPOSITORY = Path(__file__).parent.parent
HEEDING = ("env", "--default-signal=INT,TERM,HUP")
"""Whoever runs the tests in the background has them ignore interrupts, and so their children."""


def steps_job(**changes: Any) -> dict[str, Any]:
    """Return a run file of the torch-free trainer: 2 nodes of 2 ranks, 1 spare."""
    spec: dict[str, Any] = {
        "nodes": {**runfiles.NODES},
        "parallelism": {"dpReplicate": 1, "dpShard": 4},
        "trainer": {
            "entrypoint": "tests.programs.steps:main",
            "steps": 60,
            "options": {"steps": 60, "step_s": 0.02, "save_every": 5, "durable_every": 20},
        },
        "checkpoint": {"everySteps": 20, "memoryEverySteps": 5},
        "detection": {"detectWithin": "2s"},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = spec
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return runfiles.fields("steps", **spec)


@dataclass
class Job:
    """One `holdfast run`, started in a folder of its own."""

    root: Path
    run: dict[str, Any]
    faults: list[dict[str, Any]] = field(default_factory=list)
    started: subprocess.Popen[str] | None = None
    cwd: Path = REPOSITORY

    @property
    def folder(self) -> RunFolder:
        """Return the folder of the run."""
        return RunFolder(self.root / "run")

    def start(self, *options: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Start the command, at the end of the command line `before`, if there is one.

        Its output is at `root`/out, its errors at `root`/err.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        run_file = self.root / "run.yaml"
        run_file.write_text(yaml.safe_dump(self.run), encoding="utf-8")
        command = [*HEEDING, *before, str(Path(sys.executable).with_name("holdfast")), "run"]
        command += [str(run_file)]
        if self.faults:
            plan = {"kind": "FaultPlan", "faults": self.faults}
            plan_file = self.root / "faults.yaml"
            plan_file.write_text(yaml.safe_dump(plan), encoding="utf-8")
            command += ["--faults", str(plan_file)]
        command += ["--out", str(self.folder.root), *options]
        with (self.root / "out").open("a") as out, (self.root / "err").open("a") as err:
            self.started = subprocess.Popen(
                command,
                cwd=self.cwd,
                stdout=out,
                stderr=err,
                text=True,
                env=dict(os.environ, HOLDFAST_HOME=str(self.root / "home")),
            )
        return self.started

    def finish(self, timeout_s: float = 45.0) -> int:
        """Wait for the command; return its exit code."""
        assert self.started is not None
        return self.started.wait(timeout_s)

    def conduct(self, *options: str, timeout_s: float = 45.0) -> tuple[int, Report]:
        """Run it to its end; return exit code and report."""
        self.start(*options)
        code = self.finish(timeout_s)
        assert self.folder.report.exists(), self.output()
        self.check()
        return code, self.report()

    def check(self) -> None:
        """Check what must hold of every run, at every event of its journal."""
        told = journal.read(self.folder.journal.read_bytes())
        assert told.header is not None, self.output()
        checkers.check(told.header.run, told.entries)

    def report(self) -> Report:
        """Return the report of the run that has ended."""
        return msgspec.json.decode(self.folder.report.read_bytes(), type=Report)

    def entries(self) -> list[journal.Entry]:
        """Return what is in the journal."""
        return journal.read(self.folder.journal.read_bytes()).entries

    def restored(self, generation: int) -> list[tuple[int, int]]:
        """Return step and generation of what each rank of a generation restored."""
        logs = [self.folder.rank_log(rank).read_text() for rank in range(4)]
        return [(step, by) for log in logs for g, step, by in restores(log) if g == generation]

    def train(self) -> None:
        """Start it, and wait until it trains."""
        self.start("--quiet")
        reached = Path(self.run["spec"]["trainer"]["options"]["lockstep"]) / "1.0"
        deadline = time.monotonic() + 90
        while not reached.exists() or int(reached.read_text() or 0) < 10:
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def drain(self, *nodes: str) -> tuple[int, Report]:
        """Run it; once it trains, have nodes be free of it."""
        self.train()
        done = self.holdfast("drain", "node", *nodes, "--reason", "a test", "--wait", "20s")
        assert done.returncode == 0, done.stderr
        return self.finish(), self.report()

    def holdfast(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Call the command line, about this run."""
        command = [str(Path(sys.executable).with_name("holdfast")), *arguments]
        command += ["--run", str(self.folder.root)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def hush(self, node: str, seconds: float) -> tuple[int, Report]:
        """Run it; once it trains, keep a node's agent from running for a while."""
        self.train()
        born = (self.folder.nodes / node / "born.json").read_text()
        told = set(re.findall(r"\d+", born))  # whole numbers: a short one may be a part of others
        agents = [p for p, c in self.processes() if "orchestrator.agent" in c and str(p) in told]
        (pid,) = agents
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)
        return self.finish(), self.report()

    def output(self) -> str:
        """Return what the command has printed."""
        return "".join((self.root / name).read_text(encoding="utf-8") for name in ("out", "err"))

    def leftovers(self) -> list[str]:
        """Return processes and memory that are of this run and are still there."""
        left = [f"{pid}: {command}" for pid, command in self.processes()]
        memory = memory_of(self.folder)
        return left + ([str(memory)] if memory.exists() else [])

    def processes(self) -> list[tuple[int, str]]:
        """Return the living processes that work for this run: they have a file of its folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    files = [str((entry / "fd" / n).readlink()) for n in ("1", "2")]
                    command = (entry / "cmdline").read_text().replace("\0", " ")
                except OSError:
                    continue
                if any(name.startswith(str(self.folder.root)) for name in files):
                    found.append((int(entry.name), command))
        return found

    def close(self) -> None:
        """End whatever a failed test left behind of this run; print what its logs end with."""
        for name in ("supervisor.log", "controller.log"):
            path = self.folder.logs / name
            if path.exists():
                sys.stdout.write(f"{name} ends with\n{path.read_text(errors='replace')[-3000:]}\n")
        if self.started is not None and self.started.poll() is None:
            self.started.send_signal(signal.SIGINT)
            try:
                self.started.wait(20)
            except subprocess.TimeoutExpired:
                self.started.kill()
                self.started.wait(10)
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid, _ in left:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
