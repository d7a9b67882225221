"""Finds what happened in a stretch of time, without reading the months of a journal before it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from orchestrator.core import journal
from orchestrator.core.journal import Entry, JournalError
from orchestrator.protocol.ids import Seconds

NEAR_BYTES = 1 << 20
"""Within so many before the first line that is wanted, lines are read one after the other."""
SLACK_S = 60.0
"""Threads of a world may stamp what they tell out of order, by far less."""


def entries(path: Path, start: Seconds, end: Seconds) -> Iterator[Entry]:
    """Yield the entries from `start` to `end`, and a few of before and after.

    Raises:
        JournalError: at a line there that is damaged, and others follow it.
        OSError: if the journal can not be read.
    """
    with path.open("rb") as file:
        file.seek(_before(file, start - SLACK_S))
        while raw := file.readline(journal.LINE_MAX_BYTES):
            record, problem = journal.read_line(raw)
            if record is None:
                if file.read(1):
                    begin = file.tell() - len(raw) - 1
                    raise JournalError(f"the line at byte {begin} is damaged: {problem}: {path}")
                return  # torn, or being written
            if not isinstance(record, Entry):
                continue
            if record.event.at > end + SLACK_S:
                return
            yield record


def _before(file: BinaryIO, at: float) -> int:
    """Return where a line begins before which nothing is of `at` or later, bytes."""
    low, high = 0, file.seek(0, os.SEEK_END)
    while high - low > NEAR_BYTES:
        middle = (low + high) // 2
        file.seek(middle)
        file.readline(journal.LINE_MAX_BYTES)  # the rest of a line
        begin = file.tell()
        record, _ = journal.read_line(file.readline(journal.LINE_MAX_BYTES))
        if isinstance(record, Entry) and record.event.at < at:
            low = begin
        else:
            high = middle
    return low
