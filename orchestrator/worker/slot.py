"""Staging slots: where a rank puts its shards for its agent to keep."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from orchestrator.protocol.ids import Rank


class Slot:
    """A staging slot: shared memory that outlives this process, owned by the agent.

    Attributes:
        number: index of the slot.
        buffer: writable, exactly the size that was asked for.
    """

    def __init__(self, number: int, path: Path, size: int) -> None:
        self.number = number
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END) < size:
                # Allocated now, not at first touch: a full /dev/shm must be an error, not SIGBUS.
                os.posix_fallocate(file.fileno(), 0, size)
            # Mapped at once, too: page by page takes 1 s for each gigabyte of the first save.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._map = mmap.mmap(file.fileno(), size, flags=flags)
            self._path, self._inode = path, os.fstat(file.fileno()).st_ino
        self.buffer = memoryview(self._map)

    @property
    def is_there(self) -> bool:
        """Whether the agent would find in the file what is written here.

        It removes the slots of a rank that has no seat on its node, which may get one again.
        """
        try:
            return self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False


class Slots:
    """The slots of the seat that a process has: which it may write to, and those it has mapped.

    Methods may be called from any thread.

    Args:
        memory: the agent's folder in shared memory.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._rank = Rank(-1)
        self._free: list[int] = []
        self._freed: list[int] = []
        """Freed since the newest seat came."""
        self._mapped: dict[Path, Slot] = {}

    def expect(self) -> None:
        """Take note that a seat came: what is freed from now on is free in it, too."""
        with self._lock:
            self._freed = []

    def begin(self, rank: Rank, free: Iterable[int]) -> None:
        """Take the newest seat, of `rank`, which names these slots as free.

        Slots that are mapped and still this rank's stay so: to map them anew would cost the first
        save after a recovery some tenths of a second for each gigabyte.
        """
        with self._lock:
            self._rank = rank
            self._mapped = {
                path: slot
                for path, slot in self._mapped.items()
                if path == self._file(slot.number) and slot.is_there
            }
            self._free = sorted({*free, *self._freed})

    def freed(self, number: int) -> None:
        """Take note that a slot may be written again."""
        with self._lock:
            # The seat that waits to be taken does not name it yet.
            self._freed.append(number)
            if number not in self._free:
                self._free.append(number)

    def claim(self, size: int) -> Slot | None:
        """Return a slot of `size` bytes; None if none is free or there is no room."""
        with self._lock:
            if not self._free:
                return None
            number = self._free.pop(0)
            # By file, not by number: a process that is seated at another rank has other slots.
            path = self._file(number)
            known = self._mapped.get(path)
        if known is None or len(known.buffer) != size or not known.is_there:
            try:
                known = Slot(number, path, size)
            except OSError as error:  # no room: a failed save does not end training either
                print(f"no slot of {size} bytes: {error}", file=sys.stderr)  # noqa: T201 - the log
                self.give_back(number)
                return None
            with self._lock:
                self._mapped[path] = known
        return known

    def give_back(self, number: int) -> None:
        """Take back a slot unused."""
        with self._lock:
            self._free.append(number)

    def let_go(self) -> None:
        """Hold no slot any more.

        The memory of one that the agent has removed is free once nobody maps it.
        """
        with self._lock:
            self._free = []
            self._mapped = {}

    def _file(self, number: int) -> Path:
        return slot_file(self._memory, self._rank, number)


def restore_view(path: str | Path) -> memoryview:
    """Return a read-only view of a file in shared memory that a rank restores from.

    Its pages are mapped at once: one by one, as they are read, costs as much as the reading.

    Raises:
        OSError: if it can not be mapped.
    """
    with Path(path).open("rb") as file:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return memoryview(mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ))


@contextlib.contextmanager
def restore_reader(path: str | Path) -> Iterator[Callable[[int, memoryview], int]]:
    """Open a file in shared memory that a rank restores from; close it when the block is over.

    Copying out of it takes no longer than reading from a map of it, whose pages have to be mapped
    besides.

    Returns:
        What fills a buffer with the bytes from a place on, and returns how many; any thread.

    Raises:
        OSError: if it can not be opened.
    """
    with Path(path).open("rb", buffering=0) as file:
        yield lambda start, buffer: os.preadv(file.fileno(), [buffer], start)


def slot_file(memory: Path, rank: Rank, number: int) -> Path:
    """Return the file of a rank's staging slot in its agent's folder in shared memory."""
    return memory / f"rank-{rank:05d}.slot-{number}"
