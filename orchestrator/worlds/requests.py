"""What operators ask of a run that goes on: files in its folder, for whichever controller decides.

As with a request to stop, whoever may write to the run's folder may ask, a controller that is just
being started again misses nothing, and a file stands until what it asks is on record. Taken up once
more after a crash in between, it asks the same again, which changes nothing.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Literal

import msgspec

from orchestrator.core.events import DrainCancelled, DrainRequested, Event
from orchestrator.protocol.ids import NodeId, Seconds

log = logging.getLogger(__name__)


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request: nodes are to be free, or may be used again."""

    ask: Literal["drain", "uncordon"]
    nodes: tuple[NodeId, ...]
    by: str
    reason: str = ""
    within_s: float | None = None

    def event(self, at: Seconds) -> DrainRequested | DrainCancelled:
        """Return what the controller is told when it is taken up."""
        if self.ask == "uncordon":
            return DrainCancelled(at=at, nodes=self.nodes, by=self.by)
        return DrainRequested(
            at=at, nodes=self.nodes, by=self.by, reason=self.reason, within_s=self.within_s
        )


def leave(folder: Path, request: Request) -> Path:
    """Leave a request in a folder, which is made if need be; return its file.

    It appears as a whole. Requests are taken up in the order in which they were left.
    """
    folder.mkdir(exist_ok=True)
    name = f"{time.time_ns():020d}-{os.getpid()}.json"
    temporary = folder / f".{name}"
    temporary.write_bytes(msgspec.json.encode(request))
    return temporary.rename(folder / name)


class Inbox:
    """The requests of one run, as its controller sees them.

    Args:
        folder: where they are left; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: dict[Path, Event] = {}
        self._unreadable: set[Path] = set()

    def look(self, at: Seconds) -> list[Event]:
        """Return what is asked that was not before, in order. What is no request is removed."""
        events: list[Event] = []
        for path in sorted(self._folder.glob("[!.]*.json")):
            if path in self._taken or path in self._unreadable:
                continue
            try:
                request = msgspec.json.decode(path.read_bytes(), type=Request)
            except FileNotFoundError:
                continue  # taken back
            except OSError as error:
                log.warning("a request can not be read: %s: %s", error.strerror, path)
                self._unreadable.add(path)
                continue
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                log.warning("no request, removed: %s: %s", error, path)
                path.unlink(missing_ok=True)
                continue
            self._taken[path] = event = request.event(at)
            events.append(event)
        return events

    def settle(self, event: Event) -> None:
        """Remove the request that led to an event, now that it is on record."""
        for path, told in tuple(self._taken.items()):
            if told is event:
                path.unlink(missing_ok=True)
                del self._taken[path]
