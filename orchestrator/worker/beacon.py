"""The beacon: a page of shared memory where a rank says where it is, readable while it is frozen.

The rank writes into whichever of two copies is not current and then flips one word, so that the
current copy of a rank that was stopped, at any instruction, is whole. The copy that a reader looks
at may be written anew meanwhile by a rank that runs; a checksum tells, and the reader looks again.
A ring behind the two copies keeps the last completed steps, so that a slow reader, or one that
comes after the rank's death, misses none of them; another keeps the digests of the last steps.
Collectives are also counted for each process group, in words of their own: who asks in which one a
rank stands asks for a rank that does not move.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from orchestrator.protocol.digests import KINDS, Taken
from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.phases import RankPhase

MAGIC = 0x484F4C4446535438
"""'HOLDFST8'; changes with the layout."""
_HEAD_BYTES = 32
"""Four words: the magic number, the current copy (0 or 1), the steps ever recorded, the digests."""
_MAGIC_WORD, _CURRENT_WORD, _RECORDED_WORD, _DIGESTED_WORD = range(4)
_SUM_BYTES = 4
_BODY = struct.Struct("<qqqqqqqqqdddd")
_STEP = struct.Struct("<Qqqddqd")  # its number among all ever recorded, then a StepRecord
_DIGESTS = struct.Struct(f"<Qqqqqqq{len(KINDS)}Q")
"""Its number among all ever recorded, generation, the fields of Taken, one word per kind."""
_COPY_AT = (64, 64 + 128)
GROUPS_MAX = 16
"""Process groups whose collectives are counted one by one; what is in others counts in the sum."""
GROUP_NAME_MAX = 24
"""Bytes of a group's name, in UTF-8."""
_COUNTS_AT = 320
"""For each group two words: collectives entered, and left."""
_GROUP = struct.Struct(f"<q{GROUP_NAME_MAX}s")  # the generation that it is of, its name
_GROUPS_AT = _COUNTS_AT + GROUPS_MAX * 16
_GROUP_BYTES = 40
WHAT_MAX = 48
"""Bytes of what a collective is called, in UTF-8; what is beyond them is cut off."""
_WHAT = struct.Struct(f"<{WHAT_MAX}s")
_TITLES_AT = _GROUPS_AT + GROUPS_MAX * _GROUP_BYTES
_WHAT_BYTES = 56
_RING_AT = 2112
_ENTRY_BYTES = 64
RING_STEPS = 256
_DIGESTS_AT = _RING_AT + RING_STEPS * _ENTRY_BYTES
_DIGESTS_BYTES = 128
PAGE_BYTES = _DIGESTS_AT + RING_STEPS * _DIGESTS_BYTES
LOOKS_MAX = 100
"""A look fails only if the rank writes during it; a hundred times in a row is no rank."""


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
    left: int
    """Collectives left in this generation; one less than entered while it waits in one."""
    progress: int
    """Grows by one with every sign of life; equal values at two looks mean it stood still."""
    moved_ns: int
    """CLOCK_MONOTONIC of the last sign of life, nanoseconds; this machine's clock only."""
    stall_s: float
    """Seconds that saving has kept training waiting, since this process began."""
    compute_s: float
    """Seconds spent computing in steps, without waiting for peers, since this process began."""
    busy_s: float
    """Processor seconds of that; 0 if nobody said, or something else than a processor computes."""
    work: float
    """What was computed in them, in any unit that all ranks use."""


class StepRecord(NamedTuple):
    """One completed step as the rank that completed it saw it."""

    generation: Generation
    step: Step
    loss: float
    grad_norm: float
    tokens: int
    """Tokens of the global batch."""
    seconds: float


class GroupCount(NamedTuple):
    """How many collectives of a process group a rank has entered, and how many it has left."""

    group: str
    entered: int
    left: int
    what: str = ""
    """What the last one is that it has entered, as all its ranks call it; "" if nobody said."""


class DigestRecord(NamedTuple):
    """What a rank digested at one step."""

    generation: Generation
    taken: Taken
    values: tuple[int, ...]
    """One for each of KINDS."""


_NOTHING = Reading(
    *(Generation(0), Rank(-1), RankPhase.STARTING, Step(0), 0, 0, 0, 0, 0),
    stall_s=0.0,
    compute_s=0.0,
    busy_s=0.0,
    work=0.0,
)


class BeaconWriter:
    """The rank's end. One writer; calls cost a few microseconds and never block."""

    def __init__(self, path: Path) -> None:
        self._page = _map(path)
        self._words = _words(self._page)
        self._current = 0
        self._counts = _counts(self._page)
        self._titles = [""] * GROUPS_MAX
        self._recorded = self._digested = 0
        self._now = _NOTHING
        self._flip()
        # The magic number last: whoever sees it sees a copy.
        self._words[_MAGIC_WORD] = MAGIC

    def update(self, **changes: Any) -> None:  # noqa: ANN401 - fields of Reading, checked by it
        """Change the named fields of the reading and count it as a sign of life."""
        self._now = self._now._replace(**changes)
        self._flip()

    @property
    def now(self) -> Reading:
        """What was last written."""
        return self._now

    def groups(self, names: Sequence[str]) -> None:
        """Have collectives of these groups counted from 0 on, of the first `GROUPS_MAX` at most.

        Raises:
            ValueError: if a name is longer than `GROUP_NAME_MAX` bytes, or empty.
        """
        for name in names:
            if not 0 < len(name.encode()) <= GROUP_NAME_MAX:
                raise ValueError(
                    f"name of a group is {name!r}, expected 1 to {GROUP_NAME_MAX} bytes of UTF-8"
                )
        for slot in range(GROUPS_MAX):
            self._counts[2 * slot] = self._counts[2 * slot + 1] = 0
            name = names[slot] if slot < len(names) else ""
            content = _GROUP.pack(self._now.generation, name.encode())
            _put(self._page, _GROUPS_AT + slot * _GROUP_BYTES, content)
            self._say_what(slot, "")

    def enter(self, slot: int | None, what: str = "") -> None:
        """Count a collective as entered, also of the group that has this place, if any has.

        Args:
            slot: the place.
            what: what it is, as every rank calls it that enters the same one.
        """
        if slot is not None:
            self._say_what(slot, what)
            self._counts[2 * slot] += 1
        self.update(collectives=self._now.collectives + 1)

    def _say_what(self, slot: int, what: str) -> None:
        if self._titles[slot] != what:
            self._titles[slot] = what
            content, at = _of_what(what), _TITLES_AT + slot * _WHAT_BYTES
            self._page[at : at + len(content)] = content

    def leave(self, slot: int | None) -> None:
        """Count a collective as left, likewise."""
        if slot is not None:
            self._counts[2 * slot + 1] += 1
        self.update(left=self._now.left + 1)

    def record(self, step: StepRecord) -> None:
        """Append a completed step to the ring, the oldest giving way."""
        at = _RING_AT + (self._recorded % RING_STEPS) * _ENTRY_BYTES
        _put(self._page, at, _STEP.pack(self._recorded, *step))
        self._recorded += 1
        # The count is written after the entry: a reader that sees it sees the whole entry.
        self._words[_RECORDED_WORD] = self._recorded

    def digest(self, record: DigestRecord) -> None:
        """Append what was digested to its ring, the oldest giving way."""
        at = _DIGESTS_AT + (self._digested % RING_STEPS) * _DIGESTS_BYTES
        taken = (int(value) for value in msgspec.structs.astuple(record.taken))
        content = _DIGESTS.pack(self._digested, record.generation, *taken, *record.values)
        _put(self._page, at, content)
        self._digested += 1
        self._words[_DIGESTED_WORD] = self._digested

    def _flip(self) -> None:
        now = self._now._replace(progress=self._now.progress + 1, moved_ns=time.monotonic_ns())
        self._now = now
        other = 1 - self._current
        _put(self._page, _COPY_AT[other], _BODY.pack(*now))
        self._current = other
        self._words[_CURRENT_WORD] = other


class BeaconReader:
    """The agent's end. Reads a page whatever state its writer is in."""

    def __init__(self, path: Path) -> None:
        self._page = _map(path)
        self._words = _words(self._page)
        self._counts = _counts(self._page)
        self._seen = self._seen_digests = 0

    def read(self) -> Reading:
        """Return the current reading; of a rank that has not written yet, the empty one.

        Raises:
            BeaconError: if the page was written by something else.
        """
        magic = self._words[_MAGIC_WORD]
        if magic == 0:
            return _NOTHING
        if magic != MAGIC:
            raise BeaconError(f"beacon magic is {magic:#x}, expected {MAGIC:#x}")
        for _ in range(LOOKS_MAX):
            current = self._words[_CURRENT_WORD]
            body = _get(self._page, _COPY_AT[current & 1], _BODY)
            # Still current after the look: else it may be the next reading, already whole there
            # and not yet in force, and the look after this one would see the one before it.
            if body is not None and self._words[_CURRENT_WORD] == current:
                generation, rank, phase, step, *others = body
                return Reading(
                    Generation(generation), Rank(rank), RankPhase(phase), Step(step), *others
                )
        raise BeaconError(f"beacon was torn at {LOOKS_MAX} looks, expected a whole copy")

    def groups(self, generation: Generation) -> list[GroupCount]:
        """Return the counts of each group that the rank has named in a generation.

        Each number is whole; that they are of one moment is so only while the rank does not move.
        """
        found = []
        for slot in range(GROUPS_MAX):
            fields = _get(self._page, _GROUPS_AT + slot * _GROUP_BYTES, _GROUP)
            if fields is None or fields[0] != generation:
                continue
            name = fields[1].rstrip(b"\0").decode(errors="replace")
            if name:
                entered, left = self._counts[2 * slot], self._counts[2 * slot + 1]
                found.append(GroupCount(name, entered, left, self._what(slot)))
        return found

    def _what(self, slot: int) -> str:
        """Return what a rank last entered in a group; "" of one that is just entering it."""
        fields = _get(self._page, _TITLES_AT + slot * _WHAT_BYTES, _WHAT)
        return "" if fields is None else fields[0].rstrip(b"\0").decode(errors="replace")

    def new_steps(self) -> list[StepRecord]:
        """Return the steps recorded since the last call, oldest first.

        A reader more than `RING_STEPS` behind gets the newest `RING_STEPS` only.
        """
        recorded = self._words[_RECORDED_WORD]
        records = []
        for index in range(max(self._seen, recorded - RING_STEPS), recorded):
            at = _RING_AT + (index % RING_STEPS) * _ENTRY_BYTES
            fields = _get(self._page, at, _STEP)
            # Another one there, or half of it: this one has just given way to a newer.
            if fields is not None and fields[0] == index:
                _, generation, step, *others = fields
                records.append(StepRecord(Generation(generation), Step(step), *others))
        self._seen = recorded
        return records

    def new_digests(self) -> list[DigestRecord]:
        """Return what was digested since the last call, oldest first, as `new_steps` does."""
        digested = self._words[_DIGESTED_WORD]
        records = []
        for index in range(max(self._seen_digests, digested - RING_STEPS), digested):
            at = _DIGESTS_AT + (index % RING_STEPS) * _DIGESTS_BYTES
            fields = _get(self._page, at, _DIGESTS)
            if fields is not None and fields[0] == index:
                _, generation, step, attempt, period, shift, discarded, *values = fields
                taken = Taken(
                    step=Step(step),
                    attempt=attempt,
                    period=period,
                    shift=shift,
                    discarded=bool(discarded),
                )
                records.append(DigestRecord(Generation(generation), taken, tuple(values)))
        self._seen_digests = digested
        return records

    def close(self) -> None:
        """Unmap the page; the file stays, its owner removes it."""
        self._words.release()
        self._counts.release()
        self._page.close()


def create(path: Path) -> None:
    """Make an empty beacon page at `path`, which must be on a memory file system.

    Raises:
        FileExistsError: if something is there; a page has one life.
        OSError: if there is no room.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        # Allocated now, not at first touch: a full /dev/shm must be an error, not SIGBUS.
        os.posix_fallocate(descriptor, 0, PAGE_BYTES)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), PAGE_BYTES)


def _words(page: mmap.mmap) -> memoryview:
    """Return the head as aligned native words, each of which is read and written in one piece.

    `struct` would not do: it goes byte by byte, and clears what it is about to write.
    """
    return memoryview(page)[:_HEAD_BYTES].cast("Q")


def _counts(page: mmap.mmap) -> memoryview:
    """Return the counts of groups, as words likewise."""
    return memoryview(page)[_COUNTS_AT:_GROUPS_AT].cast("Q")


@lru_cache(maxsize=256)
def _of_what(what: str) -> bytes:
    """Return what is put there for the name of a collective, of which a program has a few."""
    content = _WHAT.pack(what.encode()[:WHAT_MAX])
    return content + _sum(content)


def _put(page: mmap.mmap, at: int, content: bytes) -> None:
    page[at : at + len(content) + _SUM_BYTES] = content + _sum(content)


def _get(page: mmap.mmap, at: int, layout: struct.Struct) -> tuple[Any, ...] | None:
    """Return the fields that lie there; None if they are not what was put there in one piece."""
    found = page[at : at + layout.size + _SUM_BYTES]
    content = found[: layout.size]
    return layout.unpack(content) if found[layout.size :] == _sum(content) else None


def _sum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_SUM_BYTES, "little")
