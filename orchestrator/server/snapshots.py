"""Snapshots on disk: what the controller knew at a line of the journal; a successor goes on there.

One file beside the journal, replaced as a whole. It only saves time: one that is missing, damaged,
of another program, or of a line that the journal does not have, is passed over, and the journal is
replayed from its beginning. The journal stays what the run rests on, and is never shortened.

    <xxh3-128 of what follows>          in hex, one line
    <JSON header>                       Head, one line
    <lines of the journal>              those that the world wants to resume from, `told` of them
    <bytes>                             of the controller (core.snapshot)
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

import orchestrator
from orchestrator.core import journal, snapshot
from orchestrator.core.controller import Controller
from orchestrator.core.journal import Entry
from orchestrator.core.phases import RunPhase
from orchestrator.core.snapshot import SnapshotError
from orchestrator.core.state import RunState
from orchestrator.server.counts import Counts
from orchestrator.server.journal import JournalFile, Mark

log = logging.getLogger(__name__)
MAX_BYTES = 1 << 30
"""Of a file that is read. A month of 16,384 ranks takes some tens of MiB."""
_CALM = (RunPhase.TRAINING, RunPhase.FINISHING)
SPENT_MIN_S = 0.05
"""Time spent on deciding, from which on a snapshot may be worth it."""
SHARE = 20
"""It is taken again when deciding has taken so many times as long as the last one."""
DUE_MAX_S = 30.0
"""Of deciding; a successor has no more than that to replay, whatever a disk took for the last."""
_PROGRAM = (
    "compose.py",
    "core",
    "detect",
    "policy",
    "protocol",
    "server/counts.py",
    "worlds/told.py",
)
"""Where it is decided what is in a snapshot, and what is made of it."""


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """Second line of the file."""

    program: str
    run_id: str
    mark: Mark
    told: int
    counts: Counts


class Snapshot(NamedTuple):
    """What could be read."""

    mark: Mark
    told: list[Entry]
    counts: Counts
    body: bytes
    """Of the controller."""


def _digest_of_program() -> str:
    """Return a digest of the source by which controllers decide; "" if that is not on the disk."""
    root = Path(orchestrator.__file__).parent
    paths = [path for name in _PROGRAM for path in (root / name, *(root / name).rglob("*.py"))]
    sources = sorted(path for path in paths if path.is_file())
    digest = xxhash.xxh3_128(f"{sys.version} {np.__version__} {msgspec.__version__}".encode())
    for path in sources:
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest() if sources else ""


PROGRAM = _digest_of_program()
"""Of what this process was started with: the files may be others by the time it takes one."""


def read(path: Path, run_id: str) -> Snapshot:
    """Read a snapshot of a run.

    Raises:
        SnapshotError: if it is damaged, or of another run or program.
        OSError: if it can not be read, FileNotFoundError if there is none.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise SnapshotError(f"has {size} bytes, expected {MAX_BYTES} at most")
    digest, _, data = path.read_bytes().partition(b"\n")
    if xxhash.xxh3_128_hexdigest(data).encode() != digest:
        raise SnapshotError("is damaged: its digest is another one")
    line, _, rest = data.partition(b"\n")
    try:
        head = msgspec.json.decode(line, type=Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SnapshotError(f"has no header: {error}") from error
    if not PROGRAM or (head.run_id, head.program) != (run_id, PROGRAM):
        raise SnapshotError(f"is of run {head.run_id} and program {head.program[:8]}")
    told, begin = [], 0
    for _ in range(head.told):
        end = rest.find(b"\n", begin) + 1
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
        program=PROGRAM,
        run_id=run_id,
        mark=taken.mark,
        told=len(taken.told),
        counts=taken.counts,
    )
    data = msgspec.json.encode(head) + b"\n" + rest
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(xxhash.xxh3_128_hexdigest(data).encode() + b"\n")
            file.write(data)
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

    def spent(self, seconds: float, state: RunState) -> bool:
        """Add what an event has cost to decide; return whether it is time for a snapshot.

        Not while a run is brought back: that has no time to lose, and its controller least.
        """
        self._spent_s += seconds
        return self._spent_s > self._due_s and state.phase in _CALM and not state.wanting

    def take(
        self, controller: Controller, file: JournalFile, told: list[Entry], counts: Counts
    ) -> None:
        """Take one. Whatever is wrong, there is none then, and it is tried again later, ever less.

        The journal is made to last first: it never has less than its snapshot.
        """
        began = time.perf_counter()
        try:
            mark = file.mark()
            taken = Snapshot(mark, told, counts, snapshot.take(controller))
            write(self._path, self._run_id, taken)
        except Exception as error:  # noqa: BLE001 - what only saves time must end nobody
            log.warning("no snapshot, a successor would replay more: %s", error)
            self._due_s = min(max(2 * self._due_s, 1.0), DUE_MAX_S)
        else:
            cost_s = time.perf_counter() - began
            self._due_s = min(max(SPENT_MIN_S, SHARE * cost_s), DUE_MAX_S)
        self._spent_s = 0.0
