"""Tells a journal in lines that a person can review: what happened, and what was decided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from orchestrator.core.decisions import Decision, RetainMemory
from orchestrator.core.events import DeviceKnown, Event, Reported, Telemetry, Tick
from orchestrator.core.journal import Entry
from orchestrator.protocol.devices import Device
from orchestrator.protocol.messages import (
    MARKS,
    Holding,
    Joined,
    Reached,
    Receipt,
    ShardsHeld,
    StacksTaken,
)

ITEMS_MAX = 8
"""Of a longer list, only how long it is."""
_SAID_ELSEWHERE = frozenset(
    {"at", "node", "generation", "fact", "reason", "incident", "seconds", "late_s"}
)


def lines(entries: Iterable[Entry]) -> Iterator[str]:
    """Yield one line per event that matters, and one per decision.

    Telemetry and ticks that led to nothing are left out, and so is what memory holds and where
    ranks stood.
    """
    for entry in entries:
        event = entry.event
        decisions = [d for d in entry.decisions if not isinstance(d, RetainMemory)]
        routine = isinstance(event, Telemetry | Tick) or (
            isinstance(event, Reported) and isinstance(event.fact, ShardsHeld | StacksTaken)
        )
        if routine and not decisions:
            continue
        yield f"{event.at:10.3f}  {_event(event)}"
        for decision in decisions:
            yield f"{'':10}  -> {_decision(decision)}"


def _event(event: Event) -> str:
    match event:
        case Reported(node=node, fact=Reached(generation=generation, mark=mark)):
            return f"{node} is {MARKS[mark]} in generation {generation}"
        case Reported(node=node, fact=Joined(generation=generation, incarnation=incarnation)):
            held = _values(event.fact)
            return f"{node} joins as incarnation {incarnation}, generation {generation}{held}"
        case Reported(node=node, fact=fact):
            return f"{node}: {type(fact).__name__}{_values(fact)}"
        case Telemetry(reports=reports):
            steps = f", steps to {reports[-1].step}" if reports else ""
            return f"Telemetry of generation {event.generation}{steps}"
        case _:
            return f"{type(event).__name__}{_values(event)}"


def _decision(decision: Decision) -> str:
    name = type(decision).__name__
    return f"{name} {decision.generation}{_values(decision)}: {decision.reason}"


_CONSTANT = frozenset(
    {"version", "pid", "peer_address", "incarnation", "mark", "ranks", "traceback"}
)


def _values(record: msgspec.Struct) -> str:
    """Return the fields that say something, as text."""
    skipped = _SAID_ELSEWHERE | (_CONSTANT if isinstance(record, Joined) else {"traceback", "pid"})
    told = [
        f"{field.name}={_value(value)}"
        for field in msgspec.structs.fields(record)
        if field.name not in skipped
        and (value := getattr(record, field.name)) not in ("", (), None, msgspec.UNSET)
    ]
    return f" ({', '.join(told)})" if told else ""


def _value(value: Any) -> str:  # noqa: ANN401, PLR0911 - of any field
    if isinstance(value, tuple) and value and isinstance(value[0], Holding):
        by_step: dict[int, list[int]] = {}
        for rank, step in ((held.rank, held.step) for held in value):
            by_step.setdefault(step, []).append(rank)
        return ", ".join(f"step {step}: {ranks}" for step, ranks in sorted(by_step.items()))
    if isinstance(value, tuple) and value and isinstance(value[0], Receipt):
        return f"shards {[receipt.shard for receipt in value]}"
    devices = value if isinstance(value, tuple) else (value,)
    if devices and isinstance(devices[0], Device | DeviceKnown):
        return ", ".join(map(_device, devices[:ITEMS_MAX]))
    if isinstance(value, tuple | dict) and len(value) > ITEMS_MAX:
        return f"{len(value)} of them"
    if isinstance(value, msgspec.Struct):
        return _values(value).strip()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _device(value: Device | DeviceKnown) -> str:
    if isinstance(value, Device):
        return f"{value.kind} {value.serial}"
    return f"{value.serial} is {value.standing}: {value.why}"
