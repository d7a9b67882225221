"""Follows a run by its journal, the one source of everything that can be seen of it.

The events are fed to a controller of our own, whose decisions nobody carries out; its state is
what there is to show. This works while the run is live, while everything is dead, and years later.
After weeks a journal takes long to read. Who asks for the state only gets it from the newest
snapshot beside it and from what came after, as a successor does; and from the whole of the journal
where there is none, or one of another program.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import BinaryIO

from orchestrator import compose
from orchestrator.core import journal, snapshot
from orchestrator.core.controller import Controller
from orchestrator.core.journal import Entry, Header, JournalError, JournalVersionError
from orchestrator.core.snapshot import SnapshotError
from orchestrator.core.state import RunState
from orchestrator.server import snapshots
from orchestrator.server.journal import seek
from orchestrator.worlds.folder import RunFolder


class Follower:
    """Knows what the journal of a run says, up to the last call of `poll`.

    Args:
        folder: of the run.
        on_entry: called with each entry, from the first one on; without, what a snapshot knows is
            taken from there.

    Attributes:
        header: whose journal it is; None while there is none.
        controller: ours, fed with every event so far; None while there is no journal.
        entries: events taken in so far, or known from a snapshot.
        skipped: events of those that were known from a snapshot.
        torn: what is wrong with the end of the journal; while a run is live that is usually a
            line that is being written.
    """

    def __init__(self, folder: RunFolder, on_entry: Callable[[Entry], None] | None = None) -> None:
        self.folder = folder
        self._on_entry = on_entry
        self._forget()

    def _forget(self) -> None:
        self.header: Header | None = None
        self.controller: Controller | None = None
        self.entries = self.skipped = 0
        self.torn = ""
        self._offset = 0
        self._inode = 0

    @property
    def state(self) -> RunState | None:
        """The run as it was at the last poll; None if it has no journal yet."""
        return None if self.controller is None else self.controller.state

    def poll(self) -> RunState | None:
        """Take in what was written since the last call; return the state, None before any.

        Raises:
            JournalError: if a line that others follow is damaged.
            OSError: if the journal is there and can not be read.
        """
        try:
            file = self.folder.journal.open("rb")
        except FileNotFoundError:
            return self.state
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                # The run began another life: what we know is of the one before.
                self._forget()
                self._inode = status.st_ino
            file.seek(self._offset)
            while self._take_line(file):
                pass
        return self.state

    def _take_line(self, file: BinaryIO) -> bool:
        raw = file.readline(journal.LINE_MAX_BYTES)
        self.torn = ""
        if not raw:
            return False
        number = self.entries + 1 + (self.header is not None)
        try:
            record, problem = journal.read_line(raw)
        except JournalVersionError as error:
            raise self._of_another_version(number, str(error)) from error
        if record is None:
            whole = raw.endswith(b"\n")
            if (whole and file.read(1)) or len(raw) == journal.LINE_MAX_BYTES:
                raise self._error(number, f"is damaged: {problem}, and others follow it")
            self.torn = f"line {number} is torn: {problem}"
            return False
        if isinstance(record, Header):
            self._take_header(record, number)
        else:
            self._take_entry(record, number)
        self._offset += len(raw)
        if isinstance(record, Header) and self._on_entry is None:
            self._skip(record, file)
        return True

    def _skip(self, header: Header, file: BinaryIO) -> None:
        """Go on from the newest snapshot, if there is one of this journal."""
        try:
            taken = snapshots.read(self.folder.snapshot, header.run.metadata.name)
            seek(file, taken.mark)
            self.controller = snapshot.restore(taken.body, compose.controller(header.run))
        except (SnapshotError, EOFError, OSError):
            # It saves time and says nothing that the journal does not: whatever is wrong with it.
            file.seek(self._offset)
            return
        self.entries = self.skipped = taken.mark.seq
        self._offset = taken.mark.offset

    def _take_header(self, header: Header, number: int) -> None:
        if self.header is not None:
            raise self._error(number, "is a second header")
        if header.version != journal.VERSION:
            raise self._of_another_version(
                number, f"version {header.version}, expected {journal.VERSION}"
            )
        self.header = header
        self.controller = compose.controller(header.run)

    def _take_entry(self, entry: Entry, number: int) -> None:
        if self.controller is None:
            raise self._error(number, "is no header; this is not a journal")
        if entry.seq != self.entries + 1:
            raise self._error(number, f"has event {entry.seq}, expected {self.entries + 1}")
        self.controller.handle(entry.event)
        self.entries = entry.seq
        if self._on_entry is not None:
            self._on_entry(entry)

    def _error(self, number: int, problem: str) -> JournalError:
        return JournalError(f"line {number} {problem}: {self.folder.journal}")

    def _of_another_version(self, number: int, problem: str) -> JournalVersionError:
        return JournalVersionError(f"line {number}: {problem}: {self.folder.journal}")
