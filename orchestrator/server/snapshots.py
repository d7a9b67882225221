"""Snapshots on disk: what the controller knew at a line of the journal; a successor goes on there.

One file beside the journal, replaced as a whole. It only saves time: one that is missing, damaged,
of another program, or of a line that the journal does not have, is passed over, and the journal is
replayed from its beginning. The journal stays what the run rests on, and is never shortened.

    <JSON header>                       Head, one line
    <lines of the journal>              those that the world wants to resume from, `told` of them
    <bytes>                             of the controller (core.snapshot)
"""

from __future__ import annotations

import logging
import os
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

import orchestrator
from orchestrator.core import journal, snapshot
from orchestrator.core.controller import Controller
from orchestrator.core.journal import Entry
from orchestrator.core.snapshot import SnapshotError
from orchestrator.server.counts import Counts
from orchestrator.server.journal import Mark

log = logging.getLogger(__name__)
MAX_BYTES = 1 << 30
"""Of a file that is read. A month of 16,384 ranks takes some tens of MiB."""
HEAD_MAX_BYTES = 1 << 20
SPENT_MIN_S = 0.05
"""Time spent on deciding, from which on a snapshot may be worth it."""
SHARE = 20
"""It is taken again when deciding has taken so many times as long as the last one."""
_PROGRAM = ("compose.py", "core", "detect", "policy", "protocol")
"""Where it is decided what a controller knows and makes of it."""


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """First line of the file."""

    program: str
    run_id: str
    mark: Mark
    told: int
    counts: Counts
    digest: str
    """xxh3-128 of everything behind this line."""


class Snapshot(NamedTuple):
    """What could be read."""

    mark: Mark
    told: list[Entry]
    counts: Counts
    body: bytes
    """Of the controller."""


@cache
def program() -> str:
    """Return a digest of the source by which controllers decide."""
    root = Path(orchestrator.__file__).parent
    paths = [path for name in _PROGRAM for path in (root / name, *(root / name).rglob("*.py"))]
    digest = xxhash.xxh3_128()
    for path in sorted(path for path in paths if path.is_file()):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read(path: Path, run_id: str) -> Snapshot:
    """Read a snapshot of a run.

    Raises:
        SnapshotError: if it is damaged, or of another run or program.
        OSError: if it can not be read, FileNotFoundError if there is none.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise SnapshotError(f"has {size} bytes, expected {MAX_BYTES} at most")
    with path.open("rb") as file:
        line = file.readline(HEAD_MAX_BYTES)
        rest = file.read(MAX_BYTES)
    try:
        head = msgspec.json.decode(line, type=Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SnapshotError(f"has no header: {error}") from error
    if (head.run_id, head.program) != (run_id, program()):
        raise SnapshotError(f"is of run {head.run_id} and program {head.program[:8]}")
    if xxhash.xxh3_128_hexdigest(rest) != head.digest:
        raise SnapshotError("is damaged: its digest is another one")
    told, begin = [], 0
    for _ in range(head.told):
        end = rest.index(b"\n", begin) + 1
        entry, problem = journal.read_line(rest[begin:end])
        if not isinstance(entry, Entry):
            raise SnapshotError(f"has a damaged line: {problem}")
        told.append(entry)
        begin = end
    return Snapshot(head.mark, told, head.counts, rest[begin:])


def write(path: Path, run_id: str, taken: Snapshot) -> None:
    """Replace the snapshot of a run. Raises OSError if there is no room, and leaves the old one."""
    rest = b"".join(map(journal.line, taken.told)) + taken.body
    head = Head(
        program=program(),
        run_id=run_id,
        mark=taken.mark,
        told=len(taken.told),
        counts=taken.counts,
        digest=xxhash.xxh3_128_hexdigest(rest),
    )
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(head) + b"\n")
            file.write(rest)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Snapshots:
    """Takes snapshots as often as is worth it: a twentieth of the time that deciding takes.

    Args:
        path: of the file.
        run_id: of the run.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self._path, self._run_id = path, run_id
        self._spent_s = 0.0
        self._due_s = SPENT_MIN_S

    def spent(self, seconds: float) -> bool:
        """Add what an event has cost to decide; return whether it is time for a snapshot."""
        self._spent_s += seconds
        return self._spent_s > self._due_s

    def take(self, controller: Controller, mark: Mark, told: list[Entry], counts: Counts) -> None:
        """Take one. Without room for it there is none, and it is tried again later."""
        began = time.perf_counter()
        try:
            body = snapshot.take(controller)
            write(self._path, self._run_id, Snapshot(mark, told, counts, body))
        except (OSError, SnapshotError) as error:
            log.warning("no snapshot, a successor would replay more: %s", error)
        self._spent_s = 0.0
        self._due_s = max(SPENT_MIN_S, SHARE * (time.perf_counter() - began))
