"""One rank's process, from its birth to its reaping. Every wait has a bound."""

from __future__ import annotations

import os
import select
import signal
import time

from orchestrator.agent import linux


class RankProcess:
    """A child of this process that leads its own process group.

    Attributes:
        pid: process id, and id of its process group.
        descriptor: becomes readable when it ends; for an event loop.
        code: exit code, minus the signal if one ended it; None while it lives.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.descriptor = os.pidfd_open(pid)
        self.code: int | None = None

    def wait(self, timeout_s: float) -> int | None:
        """Reap it if it ends within `timeout_s`; return its exit code, None if it has not."""
        if self.code is None and select.select([self.descriptor], [], [], timeout_s)[0]:
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)
            os.close(self.descriptor)
            self._reap_group()
        return self.code

    def _reap_group(self, within_s: float = 1.0) -> None:
        """End what the rank started and left behind: orphans of its group are our children now."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            try:
                os.killpg(self.pid, signal.SIGKILL)
                ended, _ = os.waitpid(-self.pid, os.WNOHANG)
            except (ProcessLookupError, ChildProcessError):
                return
            if not ended:
                time.sleep(0.001)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its whole process group; nothing happens once it is reaped."""
        if self.code is None:
            os.killpg(self.pid, number)

    def stop(self, terminate_s: float, kill_s: float) -> int | None:
        """End it: SIGTERM, then SIGKILL; None if it is still there after both.

        A stopped process does not act on SIGTERM, so it is killed at once. One that survives
        SIGKILL sits in the kernel; its node must not be used again.
        """
        vitals = linux.vitals(self.pid)
        if vitals is not None and vitals.state not in "Tt":
            self.signal(signal.SIGTERM)
            if self.wait(terminate_s) is not None:
                return self.code
        self.signal(signal.SIGKILL)
        return self.wait(kill_s)
