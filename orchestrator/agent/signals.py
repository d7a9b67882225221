"""What follows from what a node's hardware says of itself: lines of a log, and readings of gauges.

Which of them means what is a table (`signals.yaml`), not code; a run's operator may put entries of
another one in its place (spec.detection.signals). Whoever reads the hardware (a `Probe`, or the
kernel's log) hands here what it has read, and knows nothing of what follows.
"""

from __future__ import annotations

import logging
import math
import re
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol

import msgspec
import yaml

from orchestrator.agent.devices import Devices

log = logging.getLogger(__name__)
TABLE = Path(__file__).with_name("signals.yaml")
TEXT_MAX = 200
"""Characters of a line that are told on."""
OFTEN_S = 10.0
"""From an answer of a probe to the next question, where asking costs nothing. Error counters change
once in weeks, and what is throttled for minutes counts: an assumption."""

Action = Literal["unusable", "drain", "report", "note"]
"""unusable: the node loses its seats now, and the device is convicted. drain: the node gives its
seats to a spare when that costs least, and gets none until it is over. report: it is told to the
controller, which shows it and may count on it. note: it stands in the agent's log."""
Positive = Annotated[int, msgspec.Meta(ge=1)]
Span = Annotated[float, msgspec.Meta(gt=0)]


# What is read ---------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What a probe read of one device at one moment."""

    kind: str
    """gpu, disk, nic, memory or cpu."""
    device: str
    """Its name, as the kernel's log has it: of a GPU its PCI address."""
    values: Mapping[str, float]
    """By the name of the gauge (`reads` in the table)."""
    missing: Mapping[str, str] = {}
    """Gauges that could not be read, and why."""
    codes: tuple[tuple[str, int], ...] = ()
    """Events since the last reading: name of the signal, and its code."""


class Look(NamedTuple):
    """What a probe read of all its devices."""

    readings: tuple[Reading, ...] = ()
    problem: str = ""
    """Why that is not all that there is; "" if it is."""
    lacking: str = ""
    """What has to be installed before anything can be read, if it never was."""


class NoDevicesError(Exception):
    """There is nothing here for a probe to read, and there never will be.

    Attributes:
        missed: whether there are devices all the same.
    """

    def __init__(self, words: str, *, missed: bool = False) -> None:
        super().__init__(words)
        self.missed = missed


class Probe(Protocol):
    """Reads a part of a node's hardware. It may take for ever: it has a thread of its own."""

    name: str
    every_s: float
    """Seconds from an answer to the next question."""

    def look(self) -> Look:
        """Read everything once. Raises NoDevicesError if there is nothing to read."""
        ...


# What follows ---------------------------------------------------------------------------------


class BadTableError(ValueError):
    """The table of signals is none.

    Attributes:
        hint: what it is like.
    """

    hint = "orchestrator/agent/signals.yaml is the one that comes with holdfast"


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What follows from a signal."""

    action: Action
    text: str
    count: Positive = 1
    window: Span = 3600.0
    cancels: tuple[int, ...] = ()
    apart: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Signal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Lines, or a gauge, of one kind; with codes, what follows depends on the code that is read."""

    name: str
    pattern: str = ""
    """Of lines; "" for a gauge."""
    reads: str = ""
    """Name of a gauge; "" for lines."""
    rises: bool = False
    """Whether the gauge is a counter: what it rises by counts, not where it stands."""
    over: float = 0.0
    """A gauge that is no counter says something while it is above this."""
    lasting: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """And has been for so long, seconds."""
    source: str = ""
    assumption: str = ""
    own: Literal["gpu", "disk", ""] = ""
    codes: dict[int, Rule] = {}
    action: Action | Literal[""] = ""
    text: str = ""
    count: Positive = 1
    window: Span = 3600.0

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
    for signal in table.signals:
        if bool(signal.pattern) is bool(signal.reads):
            raise BadTableError(
                f"no table of signals: {signal.name} has {'both' if signal.reads else 'neither'} "
                f"of pattern and reads, expected one of them: {path}"
            )
    return table.signals


def overridden(ours: tuple[Signal, ...], theirs: tuple[Signal, ...]) -> tuple[Signal, ...]:
    """Return a table with entries of another in place of those of the same name, or in addition.

    Of an entry with codes, those that the other has are replaced, and all others stay.
    """
    by_name = {signal.name: signal for signal in theirs}
    merged = []
    for signal in ours:
        other = by_name.pop(signal.name, signal)
        if signal.codes and other.codes:
            codes = signal.codes | other.codes
            other = msgspec.structs.replace(other, codes=codes)
        merged.append(other)
    # Before ours: of several patterns that a line fits, the first one counts.
    return (*by_name.values(), *merged)


class Symptom(NamedTuple):
    """What holds of a device now, and is worth telling the controller."""

    name: str
    """Of the signal."""
    own: str
    """Of which kind the device is, where only the node's own count."""
    device: str
    action: Action
    words: str


_Key = tuple[str, str, int | None]
"""Name of a signal, device, and code."""


class Judge:
    """Counts signals, and says when a node is not to be used any more.

    Args:
        table: what means what.
        devices: the node's own; what is said of others is only noted.
        shared: other nodes have the same kernel. What it says is only noted then: one line would
            take out all of them.

    Attributes:
        blamed: by each reason for which it said so, kind and name of the device; "" if nothing
            names one. Several may fail at once, and each is to answer for itself.
    """

    def __init__(self, table: tuple[Signal, ...], devices: Devices, *, shared: bool) -> None:
        self._devices, self._shared = devices, shared
        self.blamed: dict[str, tuple[str, str]] = {}
        self._lines = [(re.compile(signal.pattern), signal) for signal in table if signal.pattern]
        self._gauges = [signal for signal in table if signal.reads]
        self._coded = {signal.name: signal for signal in table if signal.codes}
        self._seen: dict[_Key, deque[float]] = {}
        self._cancelled: dict[_Key, float] = {}
        """Until when a device's code is explained by another."""
        self._stood: dict[tuple[str, str], float] = {}
        """Where a counter stood when it was read last."""
        self._above: dict[_Key, float] = {}
        """Since when a gauge is above its limit."""
        self._noted: set[_Key] = set()
        """Gauges above their limit of which the agent's log has it already."""
        self._symptoms: dict[_Key, tuple[Symptom, float]] = {}
        """What was told of, and until when that holds."""

    def hear(self, text: str, at_s: float) -> str:
        """Take in a line that was written at a moment; return why the node is unusable, or ""."""
        for pattern, signal in self._lines:
            if (found := pattern.search(text)) is not None:
                parts = found.groupdict()
                try:
                    code = int(parts["code"]) if parts.get("code") else None
                    count = int(parts.get("count") or 1)
                except ValueError as error:  # of another's table, or a line that is damaged
                    log.warning("hardware: %s: %s; left out: %s", signal.name, text[:500], error)
                    return ""
                device = parts.get("device") or ""
                return self._weigh(signal, device, code, count, at_s, f"the kernel says: {text}")
        return ""

    def read(self, reading: Reading, at_s: float) -> str:
        """Take in what was read of a device at a moment; return why the node is unusable, or ""."""
        whys = []
        for name, code in reading.codes:
            if (coded := self._coded.get(name)) is not None:
                said = f"the driver says: {name} {code}"
                whys.append(self._weigh(coded, reading.device, code, 1, at_s, said))
        for signal in self._gauges:
            value = reading.values.get(signal.reads)
            if value is not None:
                take = self._rise if signal.rises else self._level
                whys.append(take(signal, reading.device, value, at_s))
        return next(filter(None, whys), "")

    def symptoms(self, at_s: float) -> tuple[Symptom, ...]:
        """Return what holds at a moment and is worth telling, sorted."""
        self._symptoms = {k: told for k, told in self._symptoms.items() if told[1] > at_s}
        return tuple(sorted(symptom for symptom, _ in self._symptoms.values()))

    def _rise(self, signal: Signal, device: str, value: float, at_s: float) -> str:
        """Weigh what a counter rose by since it was read last; before that, nobody knows when."""
        before = self._stood.get((signal.name, device), value)
        self._stood[signal.name, device] = value
        if value <= before:  # it may begin anew: most do when a driver is loaded
            return ""
        said = f"{signal.reads} rose by {value - before:g} to {value:g}"
        return self._weigh(signal, device, None, int(value - before), at_s, said)

    def _level(self, signal: Signal, device: str, value: float, at_s: float) -> str:
        """Weigh a gauge that has been above its limit for long enough."""
        code = int(value) if signal.codes else None
        key = (signal.name, device, code)
        for other in [k for k in self._above if k[:2] == key[:2] and k != key]:
            self._fall(signal, other, at_s)
        if value <= signal.over:
            self._fall(signal, key, at_s)
            return ""
        since = self._above.setdefault(key, at_s)
        if at_s - since < signal.lasting or key in self._noted:
            return ""
        self._noted.add(key)
        lasted = f", for {at_s - since:.0f} s" if signal.lasting else ""
        said = f"{signal.reads} is {value:g}{lasted}"
        why = self._weigh(signal, device, code, 1, at_s, said)
        if key in self._symptoms:
            self._symptoms[key] = (self._symptoms[key][0], math.inf)
        return why

    def _fall(self, signal: Signal, key: _Key, at_s: float) -> None:
        """Take note that a gauge is not above its limit any more."""
        if self._above.pop(key, None) is None:
            return
        self._noted.discard(key)
        if key in self._symptoms:
            # What comes and goes is told once, not each time.
            self._symptoms[key] = (self._symptoms[key][0], at_s + signal.lasting)

    def _weigh(
        self, signal: Signal, device: str, code: int | None, count: int, at_s: float, said: str
    ) -> str:
        rule = signal.rule(code)
        if rule is None:
            log.warning("hardware: %s %s is in no table: %s", signal.name, code, said[:500])
            return ""
        if self._shared or not self._devices.own(signal.own, device):
            whose = "a kernel that nodes share" if self._shared else "no device of this node's"
            log.warning("hardware: %s: %s; only noted: %s", signal.name, said[:500], whose)
            return ""
        key = (signal.name, device, code)
        if at_s <= self._cancelled.get(key, -1.0):
            return ""
        for other in rule.cancels:
            self._cancelled[signal.name, device, other] = at_s + rule.window
        often = self._count(key, rule, count, at_s)
        which = f"{signal.name} {code}" if code is not None else signal.name
        words = f"{which}{f' of {device}' if device else ''}: {rule.text}"
        if rule.action == "note" or often < rule.count:
            log.warning("hardware: %s: %s", words, said[:500])
            return ""
        words += f", {often} within {rule.window:g} s" if rule.count > 1 else ""
        words += f"; {said[:TEXT_MAX]}"
        if rule.action == "unusable":
            self.blamed[words] = (signal.own, device)
            return words
        log.warning("hardware: %s", words)
        symptom = Symptom(signal.name, signal.own, device, rule.action, words)
        self._symptoms[key] = (symptom, at_s + rule.window)
        return ""

    def _count(self, key: _Key, rule: Rule, count: int, at_s: float) -> int:
        """Return how many of these there were within the window, up to as many as matter."""
        times = self._seen.setdefault(key, deque(maxlen=rule.count))
        if not times or at_s - times[-1] >= rule.apart:
            times.extend([at_s] * min(count, rule.count))
        while times and times[0] < at_s - rule.window:
            times.popleft()
        return len(times)
