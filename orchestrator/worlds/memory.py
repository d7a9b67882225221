"""Claims the memory of a local run's nodes, and frees what killed runs left of theirs.

Each run has one folder in shared memory, and in it one of each node. The command that plays the
machine holds a lock on the former, an agent one on the latter (agent.memory). The kernel drops a
lock with its holder, however that ends: a run of which nobody holds any is dead. Nothing is
removed by anybody who does not hold the lock of its run.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import time
from pathlib import Path

import xxhash

from orchestrator.agent.memory import LOCK_NAME
from orchestrator.worlds.folder import RunFolder

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - what is kept there is what must not touch a disk
CLAIM_S = 30.0
"""Another command may be removing the folder as that of a dead run; it is waited for so long."""
LOOK_S = 0.01
log = logging.getLogger("holdfast.supervisor")


def memory_of(folder: RunFolder) -> Path:
    """Return the folder in shared memory of a run's nodes: one name per run folder and user."""
    return SHARED_MEMORY / f"holdfast-{os.getuid()}-{xxhash.xxh3_64_hexdigest(bytes(folder.root))}"


class MemoryNotOursError(Exception):
    """The place of the nodes' memory is taken by something that others can replace."""

    hint = "Remove it, or give the run another folder with --out: the name follows from that."


class RunMemory:
    """The memory of one run's nodes, once it is claimed.

    Attributes:
        path: its folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path = memory_of(folder)
        self._lock = -1

    def claim(self) -> None:
        """Make the folder, whose name anybody can guess, and lock it.

        Raises:
            MemoryNotOursError: if others could replace it, or hold it for `CLAIM_S`.
        """
        deadline = time.monotonic() + CLAIM_S
        while True:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
            # Not there: another command took it for a dead run's, and has removed it just now.
            with contextlib.suppress(FileNotFoundError):
                if not _is_our_folder(self.path):
                    raise MemoryNotOursError(
                        f"expected a folder of user {os.getuid()}: {self.path}"
                    )
                self.path.chmod(0o700)
                self._lock = _locked(self.path)
            if self._lock >= 0:
                return
            if time.monotonic() > deadline:
                raise MemoryNotOursError(f"locked by others for {CLAIM_S:g} s: {self.path}")
            time.sleep(LOOK_S)

    def remove(self) -> None:
        """Remove the folder, if it was claimed, and all that is in it."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def sweep() -> list[Path]:
    """Remove the memory of this user's runs that are dead; return the folders, sorted.

    Such a run was killed with all its agents, and may have no folder any more: then nobody else
    would ever look here again. If it is started again it finds what it would have cleared.

    Raises:
        OSError: if the system does not let us look.
    """
    pattern = f"holdfast-{os.getuid()}-" + "[0-9a-f]" * 16
    swept = [path for path in sorted(SHARED_MEMORY.glob(pattern)) if _removed_if_dead(path)]
    for path in swept:
        log.info("removed the memory of a run that is dead: %s", path)
    return swept


def _removed_if_dead(path: Path) -> bool:
    with contextlib.ExitStack() as held:
        try:
            if not _is_our_folder(path) or not _lock_for(held, path):
                return False
            # Held until the end: an agent of a command that was killed may be about to come.
            if not all(_lock_for(held, file) for file in sorted(path.glob(f"*/{LOCK_NAME}"))):
                return False
        except FileNotFoundError:
            return False  # somebody else was faster
        shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def _lock_for(held: contextlib.ExitStack, path: Path) -> bool:
    lock = _locked(path)
    if lock >= 0:
        held.callback(os.close, lock)
    return lock >= 0


def _locked(path: Path) -> int:
    """Return the descriptor of a folder or file that is locked now, -1 if somebody else has it.

    Raises:
        FileNotFoundError: if it is not there, or not any more.
    """
    lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    ours = False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have been removed, and made anew, between our opening and locking it.
        ours = os.path.samestat(os.fstat(lock), path.lstat())
    except BlockingIOError:
        return -1
    finally:
        if not ours:
            os.close(lock)
    return lock if ours else -1


def _is_our_folder(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
