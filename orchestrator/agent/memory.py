"""Claims the node's folder in shared memory: one agent owns it, a dead one's things are cleared.

The lock is the kernel's (flock): it is gone with its holder, however that ends, and it can not
be mistaken about a process number that was given to somebody else since.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path

LOCK_NAME = "owner.lock"
_ATTEMPTS = 16


class MemoryInUseError(Exception):
    """Another process owns this node's folder in shared memory, or it is not safe to use."""

    hint = "Does an agent of this node still run? End it, or remove the folder."


class Memory:
    """The claimed folder. Made empty, readable by its owner only.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        """Claim it.

        Raises:
            MemoryInUseError: if a live process has it, or it is a link or somebody else's.
            OSError: if it can not be made.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            self._lock = self._claim()
            if self._lock >= 0:
                break
        else:
            raise MemoryInUseError(f"folder is removed again and again: {path}")
        for left_over in path.iterdir():
            if left_over.name != LOCK_NAME:
                _remove(left_over)

    def remove(self) -> None:
        """Remove the folder and all that is in it; the memory is free once nobody maps it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _claim(self) -> int:
        """Return the held lock's descriptor, or -1 if its file vanished meanwhile."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        status = self.path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise MemoryInUseError(f"expected a folder of user {os.getuid()}: {self.path}")
        self.path.chmod(0o700)
        file = self.path / LOCK_NAME
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            return -1  # its last owner removed the folder just now
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise MemoryInUseError(f"process {owner} owns {self.path}") from None
        # The last owner may have removed the file between our opening and locking it: then
        # the lock is on a file that nobody else will ever find.
        if not _same_file(lock, file):
            os.close(lock)
            return -1
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)
        return lock


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
