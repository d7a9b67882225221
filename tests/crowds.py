"""A real controller with a crowd of agents, each a connection of one of a few processes.

The controller is the process that `holdfast run` keeps alive, and is kept alive in the same way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from orchestrator import compose
from orchestrator.agent import linux
from orchestrator.cli.controller import ControllerProcess
from orchestrator.cli.prepare import prepare
from orchestrator.core import journal
from orchestrator.core.decisions import StartGeneration
from orchestrator.core.events import Reported
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.messages import Joined
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.folder import HOME_VARIABLE, RunFolder
from tests.programs.crowd import Seated, Share, Status
from tests.runs import REPOSITORY

LOOK_S = 0.05
T = TypeVar("T")


class Usage(NamedTuple):
    """What a process uses."""

    at: float
    """When, CLOCK_MONOTONIC."""
    cpu_s: float
    rss_mb: float


class Crowd:
    """Processes that play the agents of a run.

    Args:
        folder: of the run.
        run: which.
        processes: how many at most.
        step_s: seconds that a step takes.
    """

    def __init__(self, folder: RunFolder, run: TrainingRun, processes: int, step_s: float) -> None:
        nodes = run.spec.nodes.count
        count = min(processes, nodes)
        bounds = [nodes * n // count for n in range(count + 1)]
        self.sizes = [bounds[n + 1] - bounds[n] for n in range(count)]
        self._processes: list[subprocess.Popen[bytes]] = []
        for first, size in zip(bounds, self.sizes, strict=False):
            share = Share(
                run=run.metadata.name,
                token=folder.token.read_text(encoding="ascii"),
                controller_file=str(folder.address),
                first=first,
                nodes=size,
                step_s=step_s,
                save_every=run.spec.checkpoint.memory_every_steps,
            )
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.programs.crowd"],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._processes.append(process)
            _write(process, msgspec.json.encode(share))

    def status(self) -> Status:
        """Return where all agents stand, together."""
        parts = self._ask(b"status", Status)
        newest = max(part.generation for part in parts)
        there = [part for part in parts if part.generation == newest]
        return Status(
            connected=sum(part.connected for part in parts),
            connected_at=max(part.connected_at for part in parts),
            generation=newest,
            begun=sum(part.begun for part in there),
            begun_at=max(part.begun_at for part in there),
            training=sum(part.training for part in there),
            cpu_s=sum(part.cpu_s for part in parts),
        )

    def seats(self) -> dict[NodeId, Seated]:
        """Return where every agent stands."""
        parts = self._ask(b"seats", dict[NodeId, Seated])
        return {node: seated for part in parts for node, seated in part.items()}

    def lose_first_rank(self) -> float:
        """Have rank 0, whose node the first process plays, be killed; return when."""
        _write(self._processes[0], b"exit 0")
        return _read(self._processes[0], float)

    def close(self) -> None:
        """End and reap them."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.communicate(timeout=20)

    def _ask(self, question: bytes, kind: type[T]) -> list[T]:
        for process in self._processes:
            _write(process, question)
        return [_read(process, kind) for process in self._processes]


class Side:
    """A run with its controller and its crowd."""

    def __init__(self, folder: RunFolder, run: TrainingRun, processes: int, step_s: float) -> None:
        self.folder, self.run = folder, run
        self._controller = ControllerProcess(folder, 0, room_within_s=10.0)
        self.crowd = Crowd(folder, run, processes, step_s)
        self.agents = run.spec.nodes.count

    def start(self) -> None:
        """Start the controller."""
        self._controller.keep()

    def until(self, what: str, holds: Callable[[Status], bool], within_s: float) -> Status:
        """Keep the controller alive until something holds of the crowd; return how that stands.

        Raises:
            TimeoutError: if it does not in time.
        """
        deadline = time.monotonic() + within_s
        while not holds(status := self.crowd.status()):
            if time.monotonic() > deadline:
                log = (self.folder.logs / "controller.log").read_text(encoding="utf-8")
                raise TimeoutError(f"{what}: not within {within_s:g} s: {status}: {log[-2000:]}")
            self._controller.keep()
            time.sleep(LOOK_S)
        return status

    def until_training(self, generation: int, within_s: float) -> Status:
        """Wait until every agent is connected, and trains in a generation."""

        def trains(status: Status) -> bool:
            everybody = (self.agents,) * 2
            there = (status.connected, status.training) == everybody
            return there and status.generation == generation

        return self.until(f"all train in generation {generation}", trains, within_s)

    def until_known(self, before: bytes, within_s: float) -> float:
        """Wait until it is on record that every agent is back; return when that was seen.

        Args:
            before: the journal of the controller that they were connected to.
            within_s: seconds to wait at most.

        Raises:
            TimeoutError: if it is not by then.
        """
        deadline = time.monotonic() + within_s
        back: set[NodeId] = set()
        good = before.rfind(b"\n") + 1
        while len(back) < self.agents:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(back)} of {self.agents} are back after {within_s:g} s")
            self.let(LOOK_S)
            with self.folder.journal.open("rb") as file:
                file.seek(good)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            good += len(whole)
            for line in whole.splitlines(keepends=True):
                entry, problem = journal.read_line(line)
                assert isinstance(entry, journal.Entry), problem
                if isinstance(entry.event, Reported) and isinstance(entry.event.fact, Joined):
                    back.add(entry.event.node)
        return time.monotonic()

    def let(self, seconds: float) -> None:
        """Let everybody go on for a while."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._controller.keep()
            time.sleep(min(left, 0.5))

    def usage(self) -> Usage:
        """Return what the controller has used."""
        pid = self._controller.pids[0]
        vitals = linux.vitals(pid)
        assert vitals is not None, "the controller has ended"
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        (rss,) = [line.split()[1] for line in text.splitlines() if line.startswith("VmRSS:")]
        return Usage(time.monotonic(), vitals.cpu_s, int(rss) * 1024 / 1e6)

    def kill_controller(self) -> tuple[float, bytes]:
        """Kill the controller; return when, and what it had on record."""
        at = time.monotonic()
        os.kill(self._controller.pids[0], signal.SIGKILL)
        self._controller.await_end(10)
        return at, self.folder.journal.read_bytes()

    def close(self) -> None:
        """End all processes."""
        try:
            self.crowd.close()
        finally:
            self._controller.close()

    # Afterwards ---------------------------------------------------------------------------------

    def problems(self, on_record: list[bytes]) -> list[str]:
        """Return which decisions are lost: not on record any more, not repeatable, not heard of.

        Args:
            on_record: the journals of controllers that were killed.
        """
        data = self.folder.journal.read_bytes()
        found = [
            f"journal of controller {number} is not the beginning of what there is now"
            for number, before in enumerate(on_record, start=1)
            # What it was about to write when it died was not decided.
            if not data.startswith(before[: before.rfind(b"\n") + 1])
        ]
        entries = journal.read(data).entries
        controller = compose.controller(self.run)
        found += [
            f"event {mismatch.seq} is decided otherwise when replayed"
            for mismatch in journal.replay(controller, entries)
        ]
        orders = [d for e in entries for d in e.decisions if isinstance(d, StartGeneration)]
        ranks = {node: controller.state.ranks_of(node) for node in controller.state.world}
        found += [
            f"{node} stands at {seated}, was ordered to generation {orders[-1].generation}"
            for node, seated in sorted(self.crowd.seats().items())
            if seated != Seated(orders[-1].generation, ranks.get(node, ()))
        ]
        out = [node.id for _, node in sorted(controller.state.nodes.items()) if not node.usable]
        return found + [f"{node} is not there for the controller" for node in out]


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line + b"\n")
    process.stdin.flush()


def _read(process: subprocess.Popen[bytes], kind: type[T]) -> T:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a process of the crowd ended with {process.wait(10)}")
    return msgspec.json.decode(line, type=kind)


@contextlib.contextmanager
def side(root: Path, run: TrainingRun, processes: int, step_s: float) -> Iterator[Side]:
    """Have a controller and a crowd for a run; end them with the block."""
    before = os.environ.get(HOME_VARIABLE)
    os.environ[HOME_VARIABLE] = str(root / "home")
    try:
        folder, held = prepare(run, None, root / "run")
    finally:
        if before is None:
            del os.environ[HOME_VARIABLE]
        else:
            os.environ[HOME_VARIABLE] = before
    try:
        made = Side(folder, run, processes, step_s)
        try:
            made.start()
            yield made
        finally:
            made.close()
    finally:
        os.close(held)
