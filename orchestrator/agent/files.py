"""The files that shards lie in, in a node's shared memory: what they are called, how they go."""

from __future__ import annotations

import itertools
from concurrent.futures import Executor
from pathlib import Path
from typing import Literal

from orchestrator.protocol.ids import Rank, Step

Kind = Literal["copy", "restore"]
"""What a file of the agent's own is for: another node, or a rank that is to start from it."""
_SLOTS = "rank-*.slot-*"


class Files:
    """Those of one node.

    Args:
        memory: their folder.
        threads: where files are removed.
    """

    def __init__(self, memory: Path, threads: Executor) -> None:
        self._memory, self._threads = memory, threads
        self._numbers = itertools.count()

    def slots(self) -> dict[Path, Rank]:
        """Return the staging slots that ranks have made, with whose they are.

        Raises:
            OSError: if they can not be listed.
        """
        return {
            path: Rank(int(path.name.removeprefix("rank-").partition(".")[0]))
            for path in self._memory.glob(_SLOTS)
        }

    def new(self, kind: Kind, rank: Rank, step: Step) -> Path:
        """Return a name for a file that is to be made."""
        return self._memory / f"{kind}-{rank:05d}-{step}-{next(self._numbers)}"

    def remove_soon(self, path: Path) -> None:
        """Remove one in a thread: the kernel takes 0.1 s to take back a gigabyte."""
        # Out of the way at once: a rank that gets a seat again makes its slots anew.
        gone = self._memory / f"gone-{next(self._numbers)}"
        try:
            path.rename(gone)
            self._threads.submit(remove, gone)
        except FileNotFoundError:
            return
        except RuntimeError:  # closed meanwhile
            remove(gone)

    def remove_all(self) -> None:
        """Remove every one, slots included."""
        for pattern in (_SLOTS, "copy-*", "restore-*", "gone-*"):
            for path in self._memory.glob(pattern):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, if it is there; its memory is free once nobody maps it."""
    path.unlink(missing_ok=True)
