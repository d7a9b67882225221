"""What operators ask of a run that goes on: files in its folder, for whichever controller decides.

As with a request to stop, whoever may write to the run's folder may ask, and a controller that is
just being started again misses nothing. A request is claimed by its file's name before anybody acts
on it: from then on it can not be taken back, and it stands until it is on record. Taken up once
more after a crash in between, it asks under the same name, which changes nothing. What can not be
claimed, in a folder of somebody else's, is not acted on.
"""

from __future__ import annotations

import logging
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Literal

import msgspec

from orchestrator.core.events import DrainCancelled, DrainRequested, Event
from orchestrator.protocol.ids import NodeId, Seconds

log = logging.getLogger(__name__)
CLAIMED, REFUSED = ".taken", ".refused"


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request: nodes are to be free, or may be used again."""

    ask: Literal["drain", "uncordon"]
    nodes: tuple[NodeId, ...]
    by: str
    reason: str = ""
    within_s: float | None = None

    def event(self, at: Seconds, *, name: str, late_s: float) -> DrainRequested | DrainCancelled:
        """Return what the controller is told when it is taken up, so long after it was left."""
        if self.ask == "uncordon":
            return DrainCancelled(at=at, nodes=self.nodes, by=self.by)
        return DrainRequested(
            at=at,
            nodes=self.nodes,
            by=self.by,
            reason=self.reason,
            within_s=self.within_s,
            late_s=late_s,
            request=name,
        )


def leave(folder: Path, request: Request) -> Path:
    """Leave a request in a folder, which is made if need be; return its file.

    It appears as a whole. Requests are taken up in the order in which they were left.
    """
    folder.mkdir(exist_ok=True)
    name = f"{time.time_ns():020d}-{os.getpid()}.json"
    temporary = folder / f".{name}"
    try:
        temporary.write_bytes(msgspec.json.encode(request))
        return temporary.rename(folder / name)
    finally:
        temporary.unlink(missing_ok=True)


class Standing(StrEnum):
    """What has become of a request."""

    LEFT = "left"
    CLAIMED = "claimed"
    """It is about to be put on record, and can not be taken back."""
    REFUSED = "refused"
    """The controller does not understand it."""
    RECORDED = "recorded"


def standing(path: Path) -> Standing:
    """Return what has become of a request that was left, by the name of its file."""
    # In the order in which it moves: what was looked for in vain can not come to be any more.
    for name, one in (
        (path, Standing.LEFT),
        (path.with_suffix(CLAIMED), Standing.CLAIMED),
        (path.with_suffix(REFUSED), Standing.REFUSED),
    ):
        if name.exists():
            return one
    return Standing.RECORDED


def take_back(path: Path) -> bool:
    """Take a request back; return whether that was still possible."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def forget_refused(path: Path) -> None:
    """Remove what is left of a request that was refused."""
    path.with_suffix(REFUSED).unlink(missing_ok=True)


class Inbox:
    """The requests of one run, as its controller sees them.

    Args:
        folder: where they are left; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: dict[Path, Event] = {}
        self._useless: set[Path] = set()

    def look(self, at: Seconds) -> list[Event]:
        """Return what is asked that was not before, in order, and claim it."""
        events: list[Event] = []
        found = (p for p in self._folder.glob("[!.]*") if p.suffix in (".json", CLAIMED))
        for path in sorted(found):
            if path not in self._taken and path not in self._useless:
                events += self._take(path, at)
        return events

    def _take(self, path: Path, at: Seconds) -> list[Event]:
        doing = "read"
        try:
            data = path.read_bytes()
            doing = "claimed"
            # First: whoever left it may be about to take it back.
            claimed = path.rename(path.with_suffix(CLAIMED))
        except FileNotFoundError:
            return []  # taken back
        except OSError as error:
            log.warning("a request can not be %s: %s: %s", doing, error.strerror, path)
            self._useless.add(path)
            return []
        try:
            request = msgspec.json.decode(data, type=Request)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("no request, removed: %s: %s", error, path)
            claimed.rename(path.with_suffix(REFUSED))
            return []
        event = request.event(at, name=path.stem, late_s=_age_s(path))
        self._taken[claimed] = event
        return [event]

    def settle(self, event: Event) -> None:
        """Remove the request that led to an event, now that it is on record."""
        for path, told in tuple(self._taken.items()):
            if told is event:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    log.warning("a request stays: %s: %s", error.strerror, path)
                else:
                    del self._taken[path]


def _age_s(path: Path) -> float:
    """Return how long ago a request was left; 0 if its name does not say."""
    left_ns = path.stem.partition("-")[0]
    return max((time.time_ns() - int(left_ns)) / 1e9, 0.0) if left_ns.isdecimal() else 0.0
