"""The journal on disk: one controller has it at a time, cuts it where it is torn, appends to it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from orchestrator import compose
from orchestrator.core import heritage, journal
from orchestrator.core.decisions import (
    CarryOutFault,
    CommitCheckpoint,
    Decision,
    EndRun,
    StartGeneration,
)
from orchestrator.core.events import Event, Inherited
from orchestrator.core.snapshot import SnapshotError
from orchestrator.protocol.ids import Seconds
from orchestrator.protocol.runfile import TrainingRun

CHECKSUM_BYTES = 16
"""With which a line begins."""
_MUST_LAST = (StartGeneration, CommitCheckpoint, CarryOutFault, EndRun)
"""Decisions that nobody may see the effect of before they are on the disk."""


class Mark(NamedTuple):
    """A place between two lines of a journal."""

    seq: int
    """Of the entry in the line before it; 0 for the header."""
    begin: int
    """Where that line begins, bytes."""
    offset: int
    """Where it ends."""
    checksum: str
    """Of that line, as it stands there."""


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


class MarkError(SnapshotError):
    """The journal does not have the line that a snapshot was taken at, but another one."""


class LostJournalError(journal.JournalError):
    """The journal ends before what was on record when a snapshot was taken."""

    hint = (
        "The disk has lost what the run acted on: bring the journal back. If it was cut on "
        "purpose, remove the snapshot beside it, and the run goes on from what is left."
    )


class JournalFile:
    """Appends entries. Whoever makes one must hold the controller's lock.

    Args:
        path: of the journal; made with its header if it is not there.
        run: goes into a new header, and must equal that of an old one.
        after: only what is behind this place is read; None for all of it.

    Attributes:
        entries: what was there before, behind that place.
        torn: what was wrong with the end of what was there; "" if nothing was.

    Raises:
        JournalError: if what is there can not be trusted, or is of another run.
        MarkError: if there is no such place.
    """

    def __init__(self, path: Path, run: TrainingRun, after: Mark | None = None) -> None:
        self.entries: list[journal.Entry] = []
        self.torn = ""
        header = journal.line(journal.Header(run_id=run.metadata.name, run=run))
        if after is not None:
            rest = _behind(after, header, path)
            self.entries, self.torn = rest.entries, rest.torn
            good = after.offset + rest.good_bytes
        else:
            good = self._read(path, header, run)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, good)
        os.lseek(self._file, good, os.SEEK_SET)
        if good == 0:
            self._write(header)
            good = len(header)
        self._mark = Mark(len(self.entries) + (after.seq if after else 0), 0, good, "")
        os.fsync(self._file)

    def _read(self, path: Path, header: bytes, run: TrainingRun) -> int:
        """Read all of a journal, if there is one; return where its sound part ends."""
        data = path.read_bytes() if path.exists() else b""
        # A header that was cut short has nothing behind it: the run had not begun.
        if header.startswith(data):
            return 0
        read = journal.read(data)
        if read.header.run != run:
            raise journal.JournalError(f"journal is of another run file: {path}")
        self.entries, self.torn = read.entries, read.torn
        return read.good_bytes

    def append(self, event: Event, decisions: list[Decision]) -> journal.Entry:
        """Put an event and its decisions on record.

        Raises:
            OSError: if there is no room; then nobody may act on the decisions.
        """
        entry = journal.Entry(seq=self._mark.seq + 1, event=event, decisions=tuple(decisions))
        line = journal.line(entry)
        self._write(line)
        begin = self._mark.offset
        self._mark = Mark(entry.seq, begin, begin + len(line), line[:CHECKSUM_BYTES].decode())
        if any(isinstance(decision, _MUST_LAST) for decision in decisions):
            os.fdatasync(self._file)
        return entry

    def mark(self) -> Mark:
        """Make what is there last, and return where it ends."""
        os.fdatasync(self._file)
        return self._mark

    def close(self) -> None:
        """Make it all last and close the file."""
        os.fsync(self._file)
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]


def _behind(mark: Mark, header: bytes, path: Path) -> journal.Rest:
    """Return what is behind a mark, from which its places count; nothing before it is read.

    Raises:
        MarkError: if the journal has another header, or another line at the mark.
        LostJournalError: if it ends before that: it was made to last before the snapshot was taken.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise LostJournalError(f"there is a snapshot of event {mark.seq}, and no {path}") from None
    with file:
        if file.read(len(header)) != header:
            raise MarkError("is of a journal with another header")
        try:
            seek(file, mark)
        except EOFError:
            raise LostJournalError(
                f"ends before event {mark.seq}, which was on record: {path}"
            ) from None
        return journal.read_rest(file.read(), 0, mark.seq)


def seek(file: BinaryIO, mark: Mark) -> None:
    """Go to a mark in a journal, behind the line that was the last when it was made.

    Raises:
        EOFError: if the journal ends before that.
        MarkError: if it has another line there.
    """
    file.seek(mark.begin)
    line = file.read(mark.offset - mark.begin)
    if len(line) < mark.offset - mark.begin:
        raise EOFError
    entry, problem = journal.read_line(line)
    if not isinstance(entry, journal.Entry):
        raise MarkError(f"is of event {mark.seq}, which the journal does not have: {problem}")
    if (entry.seq, line[:CHECKSUM_BYTES].decode()) != (mark.seq, mark.checksum):
        raise MarkError(f"is of another event {mark.seq} than the journal has")
