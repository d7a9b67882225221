"""Keeps the process of a run's controller alive, and says when that can not be done."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.cli.errors import CliError
from orchestrator.worlds.folder import RunFolder

DEAD_STARTS_MAX = 5
"""Controllers that may end without having put anything on record, before that is given up."""
AGAIN_S = 1.0
"""Pause before the next start of a controller that ended in order."""
ROOM_LOOK_S = 1.0
"""A controller that found no room for its journal is started again after this."""
# The exit codes of `python -m orchestrator.server`, by number: importing it would load its server.
EXIT_UNTRUSTED = 5
EXIT_NO_ROOM = 6
EXIT_FEW_DESCRIPTORS = 7
log = logging.getLogger("holdfast.supervisor")


class ControllerProcess:
    """The controller of one run, started again whenever it ends.

    A controller that can not put a decision on record ends instead of carrying it out; ranks train
    on meanwhile, and its successor decides from what is on record.

    Args:
        folder: of the run.
        port: where it listens, on loopback; 0 has the system choose.
        room_within_s: seconds that a full disk is waited for.
    """

    def __init__(self, folder: RunFolder, port: int, room_within_s: float) -> None:
        self._folder, self._port, self._room_within_s = folder, port, room_within_s
        self._child: subprocess.Popen[bytes] | None = None
        self._ended = -1
        self._size = -1
        self._dead_starts = 0
        self._full_since: float | None = None
        self._again_at = 0.0

    def keep(self) -> str:
        """Start it if it is not running; return what a person should know of that, or "".

        Raises:
            CliError: if it ends again and again without getting anywhere.
        """
        if self._child is not None and self._ended >= 0:
            code = self._child.poll()
            if code is None:
                return ""
            log.info("controller ended with %s", code)
            os.close(self._ended)
            self._ended = -1
            told = self._judge(code)
            if told:
                return told
        if time.monotonic() >= self._again_at:
            self._start()
        return ""

    def _judge(self, code: int) -> str:
        """Decide whether one that ended is worth another start."""
        size = _size(self._folder.journal)
        grew = size > self._size
        if grew or code != EXIT_NO_ROOM:
            self._full_since = None
        if code == 0:
            # The run is over, and the caller finds that out during this pause.
            self._again_at = time.monotonic() + AGAIN_S
        if code == EXIT_NO_ROOM:
            return self._await_room(last_words(self._log))
        if code == EXIT_UNTRUSTED:
            raise CliError(
                f"the controller does not trust what it finds: {last_words(self._log)}",
                "nothing was changed; `holdfast replay` shows where the journal departs",
            )
        if code == EXIT_FEW_DESCRIPTORS:
            raise CliError(
                "the controller may not open as many files as the run has agents",
                last_words(self._log),
            )
        self._dead_starts = 0 if grew else self._dead_starts + 1
        if self._dead_starts >= DEAD_STARTS_MAX:
            raise CliError(
                f"the controller ended {DEAD_STARTS_MAX} times without putting anything on "
                f"record, last with {code}: {self._log}",
                f"its last words: {last_words(self._log)}",
            )
        return ""

    def _await_room(self, words: str) -> str:
        now = time.monotonic()
        told = ""
        if self._full_since is None:
            self._full_since = now
            told = f"{words}; training goes on, and nothing is decided until there is room"
        if now - self._full_since > self._room_within_s:
            raise CliError(
                f"{words}, for more than {self._room_within_s:g} s (spec.recovery.spareWait)",
                "make room, then `holdfast run` with the same file goes on from the newest "
                "checkpoint; nothing that is on record is lost",
            )
        self._again_at = now + ROOM_LOOK_S
        return told

    def _start(self) -> None:
        self._size = _size(self._folder.journal)
        with self._log.open("ab") as output:
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # what the user's folder has is not to stand in for modules of ours
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
        self._ended = os.pidfd_open(self._child.pid)

    @property
    def pids(self) -> list[int]:
        """Its process id, once there is one."""
        return [] if self._child is None else [self._child.pid]

    @property
    def ended(self) -> list[int]:
        """A descriptor that becomes readable when it ends; none once that is known."""
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


def last_words(path: Path) -> str:
    """Return the last line of a log without its time and level."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "none"
    return lines[-1].partition(" ERROR ")[2] or lines[-1] if lines else "none"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
