"""`holdfast run`: starts the nodes and the controller of a run, and keeps them going to its end.

It decides nothing about training. It is to a local run what a kubelet is to a cluster: what ends
is started again, and at the end everything that was started is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from orchestrator import compose
from orchestrator.cli import reporting, stop
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.follow import Follower
from orchestrator.cli.prepare import prepare
from orchestrator.cli.progress import Progress
from orchestrator.core.report import report as report_of
from orchestrator.core.state import RunState
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server.app import check_port
from orchestrator.worlds.folder import RunFolder
from orchestrator.worlds.local import Machine

POLL_S = 0.4
"""The journal, and Ctrl-C, are looked at this often; what ends is started again at once."""
DEAD_STARTS_MAX = 5
"""Controllers that may end without having put anything on record, before that is given up."""
log = logging.getLogger("holdfast.supervisor")


def supervise(
    run: TrainingRun,
    plan: FaultPlan | None,
    *,
    out: Path | None,
    report: Path | None,
    timeout_s: float | None,
    progress: Progress,
    port: int = 0,
) -> int:
    """Run a job on this machine until it has ended; return the exit code.

    Args:
        run: the job, checked.
        plan: what to let loose on it, checked.
        out: folder of the run; None for its place in `home()`.
        report: file for a copy of the report.
        timeout_s: seconds after which the run is stopped; None for never.
        progress: where to show how it gets on.
        port: where the controller listens, on loopback; 0 has the system choose.

    Raises:
        PortInUseError: if something listens there.
        CliError: if it can not be started, or its controller can not be kept alive.
    """
    if report is not None and not report.absolute().parent.is_dir():
        raise CliError(f"no such folder: {report.absolute().parent}", "make it first", Exit.USAGE)
    if port:
        check_port(port)
    folder, held = prepare(run, plan, out)
    timeouts = compose.check(run, run.metadata.name)
    token = folder.token.read_text(encoding="ascii").strip()
    machine = Machine(run, folder, token, timeouts)
    controller = _Controller(folder, port)
    follower = Follower(folder)
    with _interrupts() as interrupts, _log_to(folder):
        try:
            machine.start()
            watch = _Watch(folder, follower, progress, interrupts, timeout_s)
            while not watch.over():
                for news in machine.look(controller.pids):
                    log.info(news)
                controller.keep()
                machine.await_news(POLL_S, controller.ended)
            # The controller sees the agents off and ends; both are bounded.
            controller.await_end(timeouts.kill_s + timeouts.terminate_s + timeouts.abort_s + 2.0)
        finally:
            controller.close()
            machine.close()
            state = follower.poll()
            progress.close(state)
            os.close(held)
    _write_report(state, folder.report, report)
    return _exit_code(state, watch)


class _Watch:
    """Looks whether it is time to end: the run has, somebody wants it, or time is up."""

    def __init__(
        self,
        folder: RunFolder,
        follower: Follower,
        progress: Progress,
        interrupts: list[int],
        timeout_s: float | None,
    ) -> None:
        self._folder, self._follower, self._progress = folder, follower, progress
        self._interrupts = interrupts
        self._started = time.monotonic()
        self._timeout_s = timeout_s
        self._polled = 0.0
        self._give_up_at: float | None = None
        self.timed_out = False

    def over(self) -> bool:
        """Return whether nothing more is to be waited for."""
        now = time.monotonic()
        if now - self._polled >= POLL_S:
            self._polled = now
            state = self._follower.poll()
            self._progress.update(state)
            if state is not None and state.phase.final:
                return True
        if self._timeout_s is not None and now - self._started > self._timeout_s:
            self.timed_out = True
            self._ask(f"--timeout after {self._timeout_s:g} s", now)
        if self._interrupts:
            self._ask(f"signal {signal.Signals(self._interrupts[0]).name}", now)
        insists = len(self._interrupts) > 1
        return insists or (self._give_up_at is not None and now > self._give_up_at)

    def _ask(self, by: str, now: float) -> None:
        """Ask the controller to stop the run, and allow it a while to do so."""
        if self._give_up_at is None:
            self._give_up_at = now + 5.0
            stop.ask(self._folder, by)


class _Controller:
    """The controller's process, kept alive."""

    def __init__(self, folder: RunFolder, port: int) -> None:
        self._folder, self._port = folder, port
        self._child: subprocess.Popen[bytes] | None = None
        self._ended = -1
        self._size = -1
        self._dead_starts = 0

    def keep(self) -> None:
        """Start it if it is not running.

        Raises:
            CliError: if it ends again and again without getting anywhere.
        """
        if self._child is not None:
            code = self._child.poll()
            if code is None:
                return
            log.info("controller ended with %s", code)
            size = _size(self._folder.journal)
            self._dead_starts = self._dead_starts + 1 if size <= self._size else 0
            if self._dead_starts >= DEAD_STARTS_MAX:
                raise CliError(
                    f"the controller ended {DEAD_STARTS_MAX} times without putting anything on "
                    f"record, last with {code}: {self._log}",
                    f"its last words: {_tail(self._log)}",
                )
        self._size = _size(self._folder.journal)
        with self._log.open("ab") as output:
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "orchestrator.server",
                    str(self._folder.root),
                    str(self._port),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        if self._ended >= 0:
            os.close(self._ended)
        self._ended = os.pidfd_open(self._child.pid)

    @property
    def pids(self) -> list[int]:
        """Its process id, once there is one."""
        return [] if self._child is None else [self._child.pid]

    @property
    def ended(self) -> list[int]:
        """A descriptor that becomes readable when it ends, while it lives."""
        return [] if self._ended < 0 else [self._ended]

    def await_end(self, within_s: float) -> None:
        """Wait for it to end by itself."""
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(within_s)

    def close(self) -> None:
        """End it and reap it."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait(10)
        if self._ended >= 0:
            os.close(self._ended)
            self._ended = -1

    @property
    def _log(self) -> Path:
        return self._folder.logs / "controller.log"


def _exit_code(state: RunState | None, watch: _Watch) -> int:
    end = state.end_state if state is not None else ""
    if end == "Succeeded":
        return Exit.OK
    if watch.timed_out:
        return Exit.TIMED_OUT
    if end == "Failed":
        return Exit.RUN_FAILED
    return Exit.INTERRUPTED


def _write_report(state: RunState | None, *paths: Path | None) -> None:
    if state is None:
        return
    for path in paths:
        if path is not None:
            reporting.write(report_of(state), path)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of dying of them in the middle of something."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _log_to(folder: RunFolder) -> Iterator[None]:
    handler = logging.FileHandler(folder.logs / "supervisor.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "none"
    return lines[-1] if lines else "none"
