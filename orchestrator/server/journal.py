"""The journal on disk: one controller has it at a time, cuts it where it is torn, appends to it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from orchestrator import compose
from orchestrator.core import heritage, journal
from orchestrator.core.controller import Controller
from orchestrator.core.decisions import (
    CarryOutFault,
    CommitCheckpoint,
    Decision,
    EndRun,
    StartGeneration,
)
from orchestrator.core.events import Event, Inherited
from orchestrator.protocol.ids import Seconds
from orchestrator.protocol.runfile import TrainingRun

_MUST_LAST = (StartGeneration, CommitCheckpoint, CarryOutFault, EndRun)
"""Decisions that nobody may see the effect of before they are on the disk."""


class AlreadyRunningError(Exception):
    """Another controller (or supervisor) of this run is alive."""

    hint = "There is one at a time: see `holdfast get runs`; `holdfast stop RUN` ends it."


def lock(path: Path) -> int:
    """Take the lock at `path` for as long as this process lives; return its descriptor.

    Raises:
        AlreadyRunningError: if another process has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunningError(f"held by another process: {path}") from None
    return descriptor


def replay(controller: Controller, file: JournalFile, path: Path) -> None:
    """Bring a fresh controller to where the last one stood.

    Raises:
        JournalError: if it would have decided otherwise.
    """
    mismatches = journal.replay(controller, file.entries)
    if mismatches:
        raise journal.JournalError(
            f"event {mismatches[0].seq} leads to other decisions than it did: {path}"
        )


def inheritance(path: Path, run: TrainingRun, at: Seconds) -> list[Inherited]:
    """Return what the life that `path` is the journal of left to the next one.

    It is read once for every life. What it says by itself is enough, also if this version of the
    program would have decided otherwise. Its run file may have been another one: it has been
    repaired since, as a rule.

    Args:
        path: of its journal.
        run: of the next life; has the name of that of the journal.
        at: when this is known, on the clock of the next life.

    Raises:
        JournalError: if it can not be trusted, or is of another run.
    """
    try:
        read = journal.read(path.read_bytes())
    except journal.JournalError as error:
        raise type(error)(f"{error}: {path}") from error
    if read.header.run.metadata != run.metadata:
        raise journal.JournalError(
            f"journal is of run {read.header.run.metadata.name}, "
            f"expected one of run {run.metadata.name}: {path}"
        )
    former = compose.controller(read.header.run)
    journal.replay(former, read.entries)
    return heritage.left_by(former.state, at)


class JournalFile:
    """Appends entries. Whoever makes one must hold the controller's lock.

    Args:
        path: of the journal; made with its header if it is not there.
        run: goes into a new header, and must equal that of an old one.

    Attributes:
        entries: what was there before.
        torn: what was wrong with the end of what was there; "" if nothing was.

    Raises:
        JournalError: if what is there can not be trusted, or is of another run.
    """

    def __init__(self, path: Path, run: TrainingRun) -> None:
        self.entries: list[journal.Entry] = []
        self.torn = ""
        header = journal.line(journal.Header(run_id=run.metadata.name, run=run))
        data = path.read_bytes() if path.exists() else b""
        # A header that was cut short has nothing behind it: the run had not begun.
        if data and not header.startswith(data):
            read = journal.read(data)
            if read.header.run != run:
                raise journal.JournalError(f"journal is of another run file: {path}")
            self.entries, self.torn = read.entries, read.torn
            good = read.good_bytes
        else:
            good = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, good)
        os.lseek(self._file, good, os.SEEK_SET)
        self._sequence = len(self.entries)
        if good == 0:
            self._write(header)
        os.fsync(self._file)

    def append(self, event: Event, decisions: list[Decision]) -> None:
        """Put an event and its decisions on record.

        Raises:
            OSError: if there is no room; then nobody may act on the decisions.
        """
        self._sequence += 1
        entry = journal.Entry(seq=self._sequence, event=event, decisions=tuple(decisions))
        self._write(journal.line(entry))
        if any(isinstance(decision, _MUST_LAST) for decision in decisions):
            os.fdatasync(self._file)

    def close(self) -> None:
        """Make it all last and close the file."""
        os.fsync(self._file)
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
