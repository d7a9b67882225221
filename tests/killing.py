"""Kills the controller of a running job again and again, at moments drawn by seed, and watches.

The worst moments lie between two things that belong together: on record and not yet carried out,
carried out and not yet heard of, alive and not yet listening.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from tests.runs import Job

ANYTHING = re.compile(rb"\n")
TAKEN_UP = re.compile(rb"generation \d+ begins|no seat in generation|fault plan: ")
"""A line of an agent's log: it does what it was told to. By then that must be on record."""
ORDERED = re.compile(
    rb'"type":"(StartGeneration|SearchCheckpoints|CommitCheckpoint|CarryOutFault|EndRun)"'
)
"""A line of the journal in which something is decided that must not happen twice."""
BROKEN = re.compile(rb'"type":"(FaultInjected|RankExited|NodeLost)"')
OCCASIONS: dict[str, tuple[re.Pattern[bytes] | None, float]] = {
    "as it starts": (None, 0.8),
    "at random": (None, 2.0),
    "as it writes": (ANYTHING, 0.002),
    "as it decides": (ORDERED, 0.004),
    "as it is obeyed": (TAKEN_UP, 0.001),
    "as something breaks": (BROKEN, 0.4),
}
"""What must appear in the journal or the agents' logs first, and how many seconds later at most
the controller is killed."""
EMPTY_LIVES_MAX = 3
"""Controllers in a row that are killed before they put anything on record: at five in a row the
supervisor rightly gives up."""
PATIENCE_S = 4.0
GLANCE_S = 0.0005


class Killer:
    """Ends controllers of one job; nobody else's.

    Args:
        job: started already.
        seed: of the moments.

    Attributes:
        kills: when each was, seconds since the beginning, and on what occasion; for people.
        commits: inodes under which each commit record was ever seen: one, if it was made once.
    """

    def __init__(self, job: Job, seed: int) -> None:
        self._job = job
        self._chance = np.random.Generator(np.random.Philox(seed))
        self._began = time.monotonic()
        self._last = 0
        self._size = -1
        """Of the journal, at the last kill."""
        self._empty_lives = 0
        self.kills: list[str] = []
        self.commits: dict[str, set[int]] = defaultdict(set)

    def kill(self, times: int) -> None:
        """Kill so many controllers, or fewer if the run ends before."""
        names = sorted(OCCASIONS)
        while len(self.kills) < times and (pid := self._next()):
            name = names[int(self._chance.integers(len(names)))]
            wanted, late_s = OCCASIONS[name]
            if wanted is None and self._empty_lives >= EMPTY_LIVES_MAX:
                wanted = ANYTHING
            if wanted is None or self._appears(wanted):
                self._nap(float(self._chance.uniform(0.0, late_s)))
                self._strike(pid, name)

    def watch(self, within_s: float) -> int:
        """Watch the run to its end; return its exit code."""
        deadline = time.monotonic() + within_s
        while self._alive() and time.monotonic() < deadline:
            self._nap(0.01)
        return self._job.finish(1.0)

    # Moments ------------------------------------------------------------------------------------

    def _next(self) -> int:
        """Return the process of the controller that follows the last; 0 if the run is over."""
        while self._alive():
            for pid, command in self._job.processes():
                if "orchestrator.server" in command and pid != self._last:
                    return pid
            self._nap(0.005)
        return 0

    def _appears(self, wanted: re.Pattern[bytes]) -> bool:
        """Return whether what is wanted comes to stand where it belongs, at once when it does."""
        folder = self._job.folder
        paths = sorted(folder.nodes.glob("*/agent.log")) if wanted is TAKEN_UP else [folder.journal]
        ends = {path: _size(path) for path in paths}
        deadline = time.monotonic() + PATIENCE_S
        while self._alive() and time.monotonic() < deadline:
            for path, end in ends.items():
                # It may be shorter: a successor cuts off what its predecessor did not finish.
                ends[path] = _size(path)
                if ends[path] > end and wanted.search(_from(path, end)):
                    return True
            self._nap(GLANCE_S)
        return False

    def _strike(self, pid: int, occasion: str) -> None:
        size = _size(self._job.folder.journal)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it has ended by itself: a planned fault, or the run is over
        self._last = pid
        self._empty_lives = 0 if size > self._size else self._empty_lives + 1
        self._size = size
        self.kills.append(f"{time.monotonic() - self._began:.3f} s {occasion}")

    # Watching -----------------------------------------------------------------------------------

    def _alive(self) -> bool:
        return self._job.started is not None and self._job.started.poll() is None

    def _nap(self, seconds: float) -> None:
        folder = self._job.folder.checkpoints / "commits"
        for path in folder.glob("[0-9]*.json"):
            try:
                self.commits[path.name].add(path.stat().st_ino)
            except FileNotFoundError:
                continue  # collected meanwhile
        time.sleep(seconds)


def _from(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
