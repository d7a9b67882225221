"""`holdfast get devices`, `describe device`, `release device` and `retire device`.

They read and add to the ledger itself, not a run: verdicts outlive runs. A run that goes on hears
of what was added within seconds, from its controller's side (worlds.registrar).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from orchestrator.cli import runs, units
from orchestrator.cli.blocks import facts, section
from orchestrator.cli.choices import Form, Output
from orchestrator.cli.errors import CliError, Exit, unknown
from orchestrator.cli.follow import Follower
from orchestrator.cli.reasons import require_reason
from orchestrator.cli.stop import user
from orchestrator.cli.tables import Column, Row, in_json, rendered, text
from orchestrator.core import devices
from orchestrator.core.records import Node
from orchestrator.core.standing import (
    STRIKES,
    STRIKES_DAYS,
    TRANSITIONS,
    Act,
    DeviceVerdict,
    Record,
    Standing,
)
from orchestrator.core.state import RunState
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import NodeId, Serial
from orchestrator.worlds.devices import DeviceLedger, address, address_of_all_runs
from storage.address import open_store
from storage.wrappers import RetryingStore

COLUMNS = (
    Column("SERIAL", "name"),
    Column("KIND", "kind", text),
    Column("STANDING", "standing"),
    Column("NODE", "node", text),
    Column("CONVICTED (times)", "convictions"),
    Column("SINCE (UTC)", "since", text),
    Column("WHY", "why", text),
    Column("MODEL", "model", text, wide=True),
    Column("VERDICTS", "verdicts", wide=True),
    Column("SOURCE", "source", text, wide=True),
)


class Ledger(NamedTuple):
    """A ledger that was read, and the devices of a run that goes by it."""

    uri: str
    ledger: DeviceLedger
    nodes: dict[Serial, tuple[NodeId, Device]]
    """Where each device of the run is; none without a run."""

    def rows(self) -> list[Row]:
        """Return every device as a plain object, by serial."""
        records = self.ledger.records()
        newest = {verdict.serial: verdict for verdict in self.ledger.verdicts}
        return [
            _row(serial, records.get(serial), newest.get(serial), self.nodes.get(serial))
            for serial in sorted(records.keys() | self.nodes.keys())
        ]

    def text(self, output: Output) -> str:
        """Return the list as it is printed."""
        return rendered("device", COLUMNS, self.rows(), output)

    def require_whole(self) -> None:
        """Say, once all that can be told was told, that there is more. Raises CliError then."""
        if problem := self.ledger.problem():
            raise CliError(
                f"{problem}; what the others tell is all that is shown: {self.uri}",
                "what was decided by it is lost: bring the file back, or say again what it said, "
                "with `holdfast retire device`, and remove it"
                if self.ledger.damages
                else "who asks has to be let read it; what it says counts from then on",
                Exit.DAMAGED,
            )

    def known(self, name: str) -> Serial:
        """Return the serial of that name. Raises CliError if nothing is known of it."""
        serial = Serial(name.removeprefix("device/"))
        known = self.ledger.records().keys() | self.nodes.keys()
        if serial not in known:
            raise unknown("device", serial, known, self.uri)
        return serial


def _row(
    serial: Serial,
    record: Record | None,
    newest: DeviceVerdict | None,
    place: tuple[NodeId, Device] | None,
) -> Row:
    record = record or Record(serial=serial)
    device = place[1] if place is not None else None
    return {
        "name": serial,
        "kind": device.kind if device else newest.kind if newest else "",
        "standing": record.standing,
        "node": place[0] if place is not None else newest.node if newest else "",
        "convictions": len(record.convicted_at),
        "since": _utc(record.since) if record.why else "",
        "why": record.why,
        "model": device.model if device else newest.model if newest else "",
        "verdicts": record.verdicts,
        "source": device.source if device else "",
    }


def shown(run: str | None) -> Ledger:
    """Return the ledger of a run, or that of all runs whose files name none, as it is now.

    Raises:
        CliError: if there is no such run.
        StorageError: if the ledger does not answer.
    """
    nodes: dict[Serial, tuple[NodeId, Device]] = {}
    uri = address_of_all_runs()
    if run is not None:
        follower = Follower(runs.folder_of(run))
        state, damage = runs.state_of(follower)
        runs.require_whole(damage)
        uri = address(state.run, follower.folder)
        for _, node in sorted(state.nodes.items()):
            nodes |= {device.serial: (node.id, device) for device in node.devices}
    ledger = DeviceLedger(RetryingStore(open_store(uri)))
    ledger.refresh()
    return Ledger(uri, ledger, nodes)


def described(name: str | None, run: str | None) -> str:
    """Return everything about one device, in words.

    Raises:
        CliError: if there is no such device, or part of the ledger is damaged.
    """
    found = shown(run)
    rows = {row["name"]: row for row in found.rows()}
    if name is None:
        names = ", ".join(sorted(rows)) or "(none is on record)"
        raise CliError("no device is named", f"one of {names}", Exit.USAGE)
    serial = found.known(name)
    row = rows[serial]
    record = found.ledger.records().get(serial) or Record(serial=serial)
    since = f" since {_utc(record.since)} UTC" if record.why else ""
    lines = [
        *facts(
            [
                ("Serial", serial),
                ("Kind", row["kind"]),
                ("Model", row["model"]),
                ("Known by", row["source"]),
                ("Node", row["node"]),
                ("Standing", f"{record.standing}{since}"),
                ("Means", _MEANINGS[record.standing]),
                ("Why", record.why),
                ("Convicted", _convicted(record)),
                ("Ledger", found.uri),
            ]
        ),
        *section("Verdicts", _verdicts(found.ledger.verdicts, serial)),
    ]
    if found.ledger.damages:
        lines += section("Damaged", map(str, found.ledger.damages))
    if found.ledger.unread:
        lines += section("Not to be read", map(str, found.ledger.unread))
    return units.printable("\n".join(lines))


_MEANINGS = {
    Standing.HEALTHY: "nothing is held against it",
    Standing.SUSPECT: "something points to it and proves nothing; its node is taken after others",
    Standing.QUARANTINED: "its node gets no seat; `holdfast release device` when it was repaired",
    Standing.RETEST: "its node gets no seat before it has computed what is known beforehand",
    Standing.PROBATION: "its node gets a seat if no other is free, and is watched; `holdfast "
    "release device` ends that where nothing looks for wrong state",
    Standing.RETIRED: "its node gets no seat; take it out for good",
}


def _convicted(record: Record) -> str:
    if not record.convicted_at:
        return ""
    times = ", ".join(map(_utc, record.convicted_at))
    return f"{times} UTC ({STRIKES} within {STRIKES_DAYS} days retire it)"


def _verdicts(verdicts: Iterable[DeviceVerdict], serial: Serial) -> list[str]:
    told = []
    for verdict in verdicts:
        if verdict.serial != serial:
            continue
        proof = f" by {verdict.proof}" if verdict.proof else ""
        where = ", ".join(filter(None, (verdict.run, verdict.incident, verdict.node)))
        of = f" ({where})" if where else ""
        told.append(
            f"{_utc(verdict.at)}  {verdict.act}{proof}, says {verdict.by}{of}: {verdict.reason}"
        )
    return told


def of_node(state: RunState, node: Node) -> list[str]:
    """Return the devices of a node with what is known against them, for `describe node`."""
    lines = [
        f"{device.kind} {device.serial}{f' ({device.model})' if device.model else ''}: "
        f"{_standing_in(state, device.serial)}"
        for device in node.devices
    ]
    return lines + ([node.devices_unknown] if node.devices_unknown else [])


def _standing_in(state: RunState, serial: Serial) -> str:
    if serial not in state.ambiguous:
        return str(devices.standing_of(state, serial))
    return (
        "not known, other nodes say that they have it, too, so verdicts about it keep nobody out "
        "(state who is who in spec.nodes.serials)"
    )


# What an operator says ------------------------------------------------------------------------


def release(
    what: str, names: Sequence[str], run: str | None, *, reason: str, tested: bool, output: Form
) -> str:
    """Have devices come back by steps; return where they stand now.

    Raises:
        CliError: if there are no such devices, or there is nothing to release them from.
    """
    acts = (Act.RELEASED, Act.PASSED) if tested else (Act.RELEASED,)
    return _say(what, names, run, acts=acts, reason=reason, output=output)


def retire(what: str, names: Sequence[str], run: str | None, *, reason: str, output: Form) -> str:
    """Have devices get no seat any more; return where they stand now.

    Raises:
        CliError: if there are no such devices, or they are retired already.
    """
    return _say(what, names, run, acts=(Act.RETIRED,), reason=reason, output=output)


def _say(
    what: str,
    names: Sequence[str],
    run: str | None,
    *,
    acts: Sequence[Act],
    reason: str,
    output: Form,
) -> str:
    if what.removesuffix("s") != "device":
        raise unknown("kind", what, ("device",), "only devices have a standing of their own")
    require_reason(reason)
    found = shown(run)
    serials = list(dict.fromkeys(found.known(name) for name in names))
    for serial in serials:
        _require_sense(found, serial, acts)
    for serial in serials:
        for act in _sensible(found, serial, acts):
            found.ledger.add(_verdict(found, serial, act, reason))
    rows = [row for row in found.rows() if row["name"] in serials]
    if output is Form.JSON:
        return in_json(rows)
    return "\n".join(f"{row['name']} is {_standing_words(row)}" for row in rows)


def _standing_words(row: Row) -> str:
    return "to be tested" if row["standing"] == Standing.RETEST else str(row["standing"])


def _sensible(found: Ledger, serial: Serial, acts: Sequence[Act]) -> list[Act]:
    """Return those of the acts that change anything, one after the other."""
    standing = _standing(found, serial)
    kept = []
    for act in acts:
        if standing in TRANSITIONS[act]:
            standing = TRANSITIONS[act][standing]
            kept.append(act)
    return kept


def _require_sense(found: Ledger, serial: Serial, acts: Sequence[Act]) -> None:
    if not _sensible(found, serial, acts):
        standing = _standing(found, serial)
        can = ", ".join(f"`{s}`" for s in Standing if any(s in TRANSITIONS[act] for act in acts))
        raise CliError(
            f"{serial} is {standing}, expected one of {can}: {found.uri}",
            f"look with `holdfast describe device {serial}`",
            Exit.USAGE,
        )


def _standing(found: Ledger, serial: Serial) -> Standing:
    record = found.ledger.records().get(serial)
    return Standing.HEALTHY if record is None else record.standing


def _verdict(found: Ledger, serial: Serial, act: Act, reason: str) -> DeviceVerdict:
    (row,) = [row for row in found.rows() if row["name"] == serial]
    command = "retire" if act is Act.RETIRED else "release"
    return DeviceVerdict(
        serial=serial,
        act=act,
        actor="operator",
        by=f"{user()} with `holdfast {command}`",
        reason=reason,
        kind=row["kind"],
        model=row["model"],
        node=NodeId(row["node"]),
        at=time.time(),  # noqa: TID251 - verdicts of many runs and hosts
        id=f"operator/{os.getpid()}/{time.time_ns()}",
    )


def _utc(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
