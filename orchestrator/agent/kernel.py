"""Reads the kernel's log: what it says of this node's hardware, from now on.

What follows from a line is said elsewhere (`agent/signals.py`). A log that can not be read leaves
the node without these signals, and says so.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from orchestrator.agent.signals import Judge

log = logging.getLogger(__name__)
READ_BYTES = 1 << 16
READS_MAX = 64
"""Lines of one look; the others wait for the next."""
FACILITY_SHIFT = 3
KERNEL = 0
"""The kernel's own facility; it gives another to what programs write into its log."""
_RECORD = re.compile(r"^(?P<prefix>\d+),(?P<seq>\d+),(?P<at_us>\d+),[^;]*;(?P<text>[^\n]*)")
"""Source: Linux, Documentation/ABI/testing/dev-kmsg."""


class KernelLog:
    """The kernel's log from now on.

    Args:
        path: of the device.
        judge: hears its lines.

    Attributes:
        degraded: why it is not read (any more), "" while it is.
    """

    def __init__(self, path: Path, judge: Judge) -> None:
        self.degraded = ""
        self._judge, self._path, self._file = judge, path, -1
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._file, 0, os.SEEK_END)
        except OSError as error:
            self._degrade(f"{error.strerror}: {path}")

    def look(self) -> str:
        """Return why this node is unusable, "" if nothing new says so. Never waits.

        It is said once: nothing is read after that.
        """
        for _ in range(READS_MAX if self._file >= 0 else 0):
            try:
                record = os.read(self._file, READ_BYTES)
            except BlockingIOError:
                return ""
            except BrokenPipeError:
                continue  # what came faster than we read is overwritten; the next is there
            except OSError as error:
                self._degrade(f"{error.strerror}: {self._path}")
                return ""
            if not record:
                return ""
            for line in record.decode("utf-8", "replace").splitlines():
                if why := self._take(line):
                    self.close()
                    return why
        return ""

    def _take(self, line: str) -> str:
        found = _RECORD.match(line)
        # Lines that go on with what a record is about begin with a space, and no record is like it.
        if found is None or int(found["prefix"]) >> FACILITY_SHIFT != KERNEL:
            return ""
        return self._judge.hear(found["text"], int(found["at_us"]) / 1e6)

    def close(self) -> None:
        """Let go of it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _degrade(self, why: str) -> None:
        self.close()
        self.degraded = why
        log.warning("no signals of the kernel about this node's hardware: %s", why)
