"""`holdfast run`: starts the nodes and the controller of a run, and keeps them going to its end.

It decides nothing about training. It is to a local run what a kubelet is to a cluster: what ends
is started again, and at the end everything that was started is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from orchestrator import compose
from orchestrator.cli import reporting, stop, whole
from orchestrator.cli.controller import ControllerProcess
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.follow import Follower
from orchestrator.cli.outcome import Outcome, outcome
from orchestrator.cli.prepare import ledger_problem, prepare
from orchestrator.cli.progress import Progress
from orchestrator.core.report import report as report_of
from orchestrator.core.state import RunState
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.runfile import TrainingRun, seconds
from orchestrator.server.listening import check_port
from orchestrator.worlds.folder import RunFolder
from orchestrator.worlds.machine import Machine

POLL_S = 0.4
"""The journal, and Ctrl-C, are looked at this often; what ends is started again at once."""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end the run in order, unless they are ignored."""
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
) -> Outcome:
    """Run a job on this machine until it has ended; return how it did.

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
    if report is not None:
        _require_writable(report.absolute())
    if port:
        check_port(port)
    folder, held = prepare(run, plan, out)
    if told := ledger_problem(run, folder):
        progress.say(told)
    timeouts = compose.check(run, run.metadata.name)
    token = folder.token.read_text(encoding="ascii").strip()
    machine = Machine(run, folder, token, timeouts)
    # What only others can give, a node or room, is waited for equally long.
    controller = ControllerProcess(folder, port, seconds(run.spec.recovery.spare_wait))
    follower = Follower(folder)
    with _interrupts() as interrupts, _log_to(folder):
        try:
            machine.start()
            watch = _Watch(folder, follower, progress, interrupts, timeout_s)
            while not watch.over():
                for news in machine.look(controller.pids):
                    log.info(news)
                if told := controller.keep():
                    progress.say(told)
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
    return outcome(state, folder, timeout_s if watch.timed_out else None)


def _require_writable(report: Path) -> None:
    """Refuse, before anything starts, a file that could not be written when it is over."""
    if not report.parent.is_dir():
        raise CliError(f"no such folder: {report.parent}", "make it first", Exit.USAGE)
    if report.is_dir():
        raise CliError(
            f"a folder, expected the name of a file: {report}", "add a file name", Exit.USAGE
        )
    whole.require_writable(report)


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
            try:
                stop.ask(self._folder, by)
            except OSError as error:
                # A full disk: nobody can be asked, and the run is over all the same when we end.
                log.warning("the controller can not be asked to stop: %s", error)


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

    # What was ignored when we were started stays so: `nohup` means that a hang-up ends nothing.
    heeded = [n for n in ENDING if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Log(logging.FileHandler):
    """A log that a full disk makes shorter, instead of filling the terminal with tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Drop the line; the journal is what counts."""


@contextlib.contextmanager
def _log_to(folder: RunFolder) -> Iterator[None]:
    handler = _Log(folder.logs / "supervisor.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
