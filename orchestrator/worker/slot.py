"""A staging slot: where a rank puts its shard for its agent to keep."""

from __future__ import annotations

import mmap
import os
from pathlib import Path


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
            self._map = mmap.mmap(file.fileno(), size)
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
