"""One rank's process, from its birth to its reaping. Every wait has a bound."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

from orchestrator.agent import linux

GROUP_WITHIN_S = 1.0
"""What a dead rank left behind is killed, and reaped within this; the kernel needs milliseconds."""


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

    def reap(self) -> int | None:
        """Reap it if it has ended; return its exit code, None while it lives. Does not block.

        What it started and left behind in its group is killed; see `reap_group`.
        """
        if self.code is None and self._ended(0.0):
            # Before it is reaped: until then its number is the group's and nobody else's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)
            os.close(self.descriptor)
        return self.code

    def reap_group(self, within_s: float = GROUP_WITHIN_S) -> bool:
        """Reap the killed rest of its group, whose members are our children now.

        Returns:
            Whether nothing is left of it.
        """
        deadline = time.monotonic() + within_s
        while True:
            try:
                ended, _ = os.waitpid(-self.pid, os.WNOHANG)
            except ChildProcessError:
                return True
            if not ended:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.001)

    def wait(self, timeout_s: float) -> int | None:
        """Reap it and its group if it ends within `timeout_s`; return its exit code, else None."""
        if self.code is None and self._ended(timeout_s):
            self.reap()
            self.reap_group()
        return self.code

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

    def _ended(self, within_s: float) -> bool:
        poll = select.poll()  # select() knows no descriptor above 1023
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(within_s * 1000))
