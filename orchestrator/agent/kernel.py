"""What the kernel says of this node's hardware: lines of its log, and what follows from them.

Which line means what is a table (`signals.yaml`), not code; a run's operator may put another one in
its place. A log that can not be read leaves the node without these signals, and says so.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from orchestrator.agent.devices import Devices

log = logging.getLogger(__name__)
TABLE = Path(__file__).with_name("signals.yaml")
READ_BYTES = 1 << 16
READS_MAX = 64
"""Lines of one look; the others wait for the next."""
FACILITY_SHIFT = 3
KERNEL = 0
"""The kernel's own facility; it gives another to what programs write into its log."""
_RECORD = re.compile(r"^(?P<prefix>\d+),(?P<seq>\d+),(?P<at_us>\d+),[^;]*;(?P<text>[^\n]*)")
"""Source: Linux, Documentation/ABI/testing/dev-kmsg."""


class BadTableError(ValueError):
    """The table of signals is none.

    Attributes:
        hint: what it is like.
    """

    hint = "orchestrator/agent/signals.yaml is the one that comes with holdfast"


Positive = Annotated[int, msgspec.Meta(ge=1)]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What follows from a signal."""

    action: Literal["unusable", "note"]
    text: str
    count: Positive = 1
    window: Annotated[float, msgspec.Meta(gt=0)] = 3600.0
    cancels: tuple[int, ...] = ()
    apart: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Signal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Lines of one kind; with codes, what follows depends on the code in the line."""

    name: str
    pattern: str
    source: str = ""
    assumption: str = ""
    own: Literal["gpu", "disk", ""] = ""
    codes: dict[int, Rule] = {}
    action: Literal["unusable", "note", ""] = ""
    text: str = ""
    count: Positive = 1
    window: Annotated[float, msgspec.Meta(gt=0)] = 3600.0

    def rule(self, code: int | None) -> Rule | None:
        """Return what follows from a line with a code; None for a code that nobody knows."""
        if self.codes:
            return self.codes.get(-1 if code is None else code)
        return Rule(self.action or "note", self.text, self.count, self.window)


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    signals: tuple[Signal, ...]


def read_table(path: Path = TABLE) -> tuple[Signal, ...]:
    """Read a table of signals.

    Raises:
        BadTableError: if it is none, or a pattern is no regular expression.
        OSError: if it can not be read.
    """
    try:
        table = msgspec.convert(yaml.safe_load(path.read_bytes()), _Table)
        for signal in table.signals:
            re.compile(signal.pattern)
    except (yaml.YAMLError, msgspec.ValidationError, re.error) as error:
        raise BadTableError(f"no table of signals: {error}: {path}") from error
    return table.signals


class Judge:
    """Counts signals, and says when a node is not to be used any more.

    Args:
        table: what means what.
        devices: the node's own; what is said of others is only noted.
        shared: other nodes have the same kernel. What it says is only noted then: one line would
            take out all of them.

    Attributes:
        blamed: kind and name of the device for which it said so last; "" if the log names none.
    """

    def __init__(self, table: tuple[Signal, ...], devices: Devices, *, shared: bool) -> None:
        self._devices, self._shared = devices, shared
        self.blamed = ("", "")
        self._table = [(re.compile(signal.pattern), signal) for signal in table]
        self._seen: dict[tuple[str, str, int | None], deque[float]] = {}
        self._cancelled: dict[tuple[str, str, int], float] = {}
        """Until when a device's code is explained by another."""

    def hear(self, text: str, at_s: float) -> str:
        """Take in a line that was written at a moment; return why the node is unusable, or ""."""
        for pattern, signal in self._table:
            if (found := pattern.search(text)) is not None:
                return self._weigh(signal, found.groupdict(), text, at_s)
        return ""

    def _weigh(self, signal: Signal, parts: dict[str, str], text: str, at_s: float) -> str:
        code = int(parts["code"]) if parts.get("code") else None
        device = parts.get("device") or ""
        rule = signal.rule(code)
        if rule is None:
            log.warning("kernel: %s %s is in no table: %s", signal.name, code, text[:500])
            return ""
        if self._shared or not self._devices.own(signal.own, device):
            whose = "a kernel that nodes share" if self._shared else "no device of this node's"
            log.warning("kernel: %s: %s; only noted: %s", signal.name, text[:500], whose)
            return ""
        if code is not None and at_s <= self._cancelled.get((signal.name, device, code), -1.0):
            return ""
        for other in rule.cancels:
            self._cancelled[signal.name, device, other] = at_s + rule.window
        times = self._seen.setdefault((signal.name, device, code), deque(maxlen=rule.count))
        if not times or at_s - times[-1] >= rule.apart:
            times.extend([at_s] * min(int(parts.get("count") or 1), rule.count))
        while times and times[0] < at_s - rule.window:
            times.popleft()
        which = f"{signal.name} {code}" if code is not None else signal.name
        words = f"{which}{f' of {device}' if device else ''}: {rule.text}"
        if rule.action == "note" or len(times) < rule.count:
            log.warning("kernel: %s: %s", words, text[:500])
            return ""
        self.blamed = (signal.own, device)
        often = f", {len(times)} within {rule.window:g} s" if rule.count > 1 else ""
        return f"{words}{often}; the kernel says: {text[:200]}"


class KernelLog:
    """The kernel's log from now on.

    Args:
        path: of the device.
        judge: hears its lines.

    Attributes:
        degraded: why it is not read (any more), "" while it is.
    """

    def __init__(self, path: Path, judge: Judge) -> None:
        self.degraded = ""
        self._judge, self._path, self._file = judge, path, -1
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._file, 0, os.SEEK_END)
        except OSError as error:
            self._degrade(f"{error.strerror}: {path}")

    def look(self) -> str:
        """Return why this node is unusable, "" if nothing new says so. Never waits.

        It is said once: nothing is read after that.
        """
        for _ in range(READS_MAX if self._file >= 0 else 0):
            try:
                record = os.read(self._file, READ_BYTES)
            except BlockingIOError:
                return ""
            except BrokenPipeError:
                continue  # what came faster than we read is overwritten; the next is there
            except OSError as error:
                self._degrade(f"{error.strerror}: {self._path}")
                return ""
            if not record:
                return ""
            for line in record.decode("utf-8", "replace").splitlines():
                if why := self._take(line):
                    self.close()
                    return why
        return ""

    def _take(self, line: str) -> str:
        found = _RECORD.match(line)
        # Lines that go on with what a record is about begin with a space, and no record is like it.
        if found is None or int(found["prefix"]) >> FACILITY_SHIFT != KERNEL:
            return ""
        return self._judge.hear(found["text"], int(found["at_us"]) / 1e6)

    def close(self) -> None:
        """Let go of it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _degrade(self, why: str) -> None:
        self.close()
        self.degraded = why
        log.warning("no signals of the kernel about this node's hardware: %s", why)
