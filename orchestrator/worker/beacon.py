"""The beacon: a page of shared memory where a rank says where it is, readable while it is frozen.

The rank writes into whichever of two copies is not current and then flips one aligned word, so
a reader never sees half an update, not even of a rank that was stopped in the middle of one.
A ring behind the two copies keeps the last completed steps, so that a slow reader, or one that
comes after the rank's death, misses none of them.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.phases import RankPhase

MAGIC = 0x484F4C4446535431
"""'HOLDFST1'; changes with the layout."""
_HEAD = struct.Struct("<QQQ")  # magic, current copy (0 or 1), steps ever recorded
_BODY = struct.Struct("<qqqqqqqqdd")
_STEP = struct.Struct("<qqddqd")
_COPY_AT = (64, 64 + 128)
_RING_AT = 512
RING_STEPS = 256
PAGE_BYTES = _RING_AT + RING_STEPS * _STEP.size


class BeaconError(Exception):
    """The page is not a beacon of this version."""

    hint = "Both ends must run the same version of holdfast."


class Reading(NamedTuple):
    """One consistent look at a rank."""

    generation: Generation
    rank: Rank
    phase: RankPhase
    step: Step
    """Steps completed."""
    micro_batch: int
    collectives: int
    """Collectives entered in this generation."""
    progress: int
    """Grows by one with every sign of life; equal values at two looks mean it stood still."""
    moved_ns: int
    """CLOCK_MONOTONIC of the last sign of life, nanoseconds; this machine's clock only."""
    stall_s: float
    """Seconds that saving has kept training waiting, since this process began."""
    compute_s: float
    """Seconds of the last step spent computing, without waiting for peers; 0 if not measured."""


class StepRecord(NamedTuple):
    """One completed step as the rank that completed it saw it."""

    generation: Generation
    step: Step
    loss: float
    grad_norm: float
    tokens: int
    """Tokens of the global batch."""
    seconds: float


_NOTHING = Reading(
    Generation(0), Rank(-1), RankPhase.STARTING, Step(0), 0, 0, 0, 0, stall_s=0.0, compute_s=0.0
)


class BeaconWriter:
    """The rank's end. One writer; calls cost about a microsecond and never block."""

    def __init__(self, path: Path) -> None:
        self._page = _map(path)
        self._current = 0
        self._recorded = 0
        self._now = _NOTHING
        self._flip()

    def update(self, **changes: Any) -> None:  # noqa: ANN401 - fields of Reading, checked by it
        """Change the named fields of the reading and count it as a sign of life."""
        self._now = self._now._replace(**changes)
        self._flip()

    @property
    def now(self) -> Reading:
        """What was last written."""
        return self._now

    def record(self, step: StepRecord) -> None:
        """Append a completed step to the ring, the oldest giving way."""
        at = _RING_AT + (self._recorded % RING_STEPS) * _STEP.size
        _STEP.pack_into(self._page, at, *step)
        self._recorded += 1
        # The count is written after the entry: a reader that sees it sees the whole entry.
        _HEAD.pack_into(self._page, 0, MAGIC, self._current, self._recorded)

    def _flip(self) -> None:
        now = self._now._replace(progress=self._now.progress + 1, moved_ns=time.monotonic_ns())
        self._now = now
        other = 1 - self._current
        _BODY.pack_into(self._page, _COPY_AT[other], *now[:2], int(now.phase), *now[3:])
        self._current = other
        _HEAD.pack_into(self._page, 0, MAGIC, other, self._recorded)


class BeaconReader:
    """The agent's end. Reads a page whatever state its writer is in."""

    def __init__(self, path: Path) -> None:
        self._page = _map(path)
        self._seen = 0

    def read(self) -> Reading:
        """Return the current reading; of a rank that has not written yet, the empty one.

        Raises:
            BeaconError: if the page was written by something else.
        """
        magic, current, _ = _HEAD.unpack_from(self._page, 0)
        if magic == 0:
            return _NOTHING
        if magic != MAGIC or current > 1:
            raise BeaconError(f"beacon magic is {magic:#x}, expected {MAGIC:#x}")
        fields = _BODY.unpack_from(self._page, _COPY_AT[current])
        return Reading(
            Generation(fields[0]),
            Rank(fields[1]),
            RankPhase(fields[2]),
            Step(fields[3]),
            *fields[4:],
        )

    def new_steps(self) -> list[StepRecord]:
        """Return the steps recorded since the last call, oldest first.

        A reader more than `RING_STEPS` behind gets the newest `RING_STEPS` only.
        """
        _, _, recorded = _HEAD.unpack_from(self._page, 0)
        first = max(self._seen, recorded - RING_STEPS)
        records = []
        for index in range(first, recorded):
            fields = _STEP.unpack_from(self._page, _RING_AT + (index % RING_STEPS) * _STEP.size)
            records.append(StepRecord(Generation(fields[0]), Step(fields[1]), *fields[2:]))
        self._seen = recorded
        return records

    def close(self) -> None:
        """Unmap the page; the file stays, its owner removes it."""
        self._page.close()


def create(path: Path) -> None:
    """Make an empty beacon page at `path`, which must be on a memory file system.

    Raises:
        FileExistsError: if something is there; a page has one life.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.ftruncate(descriptor, PAGE_BYTES)
    finally:
        os.close(descriptor)


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), PAGE_BYTES)
