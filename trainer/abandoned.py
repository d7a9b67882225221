"""Keeps the process groups of worlds that were left until they can be destroyed, and does so then.

The destructor of a gloo group waits for what its threads still do, and those wait for peers. While
peers may still be there, it would hold the main thread up; once the next world has formed, every
peer of the one before has left it or is dead, and it returns within milliseconds. One that does
not (gloo may miss that a connection broke while it sends, and then waits for the timeout of the
collective) holds up a thread of its own, and counts as kept until it is done.
"""

from __future__ import annotations

import sys
import threading
from typing import Any


class Abandoned:
    """Groups of past generations, in the worlds that they were of."""

    def __init__(self) -> None:
        self._kept: list[list[Any]] = []
        self._going: list[threading.Thread] = []

    def __len__(self) -> int:
        """Return how many worlds are not destroyed yet."""
        return len(self._kept) + sum(thread.is_alive() for thread in self._going)

    def add(self, objects: list[Any]) -> None:
        """Keep what belongs to a world that was left; what must outlive the others comes first."""
        self._kept.append(objects)

    def let_go(self) -> None:
        """Destroy what is kept, in threads: the next world has formed. Does not block.

        What somebody else still refers to stays: whoever drops the last reference waits.
        """
        self._going = [thread for thread in self._going if thread.is_alive()]
        kept, self._kept = self._kept, []
        while kept:
            objects = kept.pop()
            if max(_references(objects)) > _IN_A_LIST_ONLY:
                self._kept.append(objects)
                continue
            # The thread's list is the last one to refer to them: not even this frame does.
            last = [objects]
            del objects
            thread = threading.Thread(target=_destroy, args=(last,), name="holdfast-let-go")
            thread.daemon = True
            self._going.append(thread)
            thread.start()


def _references(objects: list[Any]) -> list[int]:
    return [sys.getrefcount(thing) for thing in objects]


_IN_A_LIST_ONLY = _references([object()])[0]
"""What `_references` says of a thing that nothing but its list refers to."""


def _destroy(last: list[list[Any]]) -> None:
    # From the back, one by one; torch lets other threads run meanwhile.
    objects = last.pop()
    while objects:
        objects.pop()
