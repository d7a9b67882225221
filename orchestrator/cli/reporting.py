"""`holdfast report` and `replay`: what became of a run, and whether its journal is true."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from orchestrator import compose
from orchestrator.cli import runs, story, units, whole
from orchestrator.cli.blocks import facts, ledger_lines, section
from orchestrator.cli.choices import Form
from orchestrator.cli.errors import CliError
from orchestrator.cli.follow import Follower
from orchestrator.core import journal
from orchestrator.core.journal import JournalError
from orchestrator.core.report import FaultReport, IncidentReport, Report, report
from orchestrator.worlds.folder import RunFolder


def as_json(told: Report) -> bytes:
    """Return a report as JSON, as `--report` and `report.json` have it."""
    return msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n"


def write(told: Report, path: Path) -> None:
    """Write a report to a file, as a whole or not at all.

    Raises:
        OSError: if that is not possible.
    """
    whole.write(path, as_json(told))


class Shown(NamedTuple):
    """The report of a run, as text and as data."""

    text: str
    told: Report
    damage: JournalError | None
    """What is wrong with the journal, if it tells more than could be trusted."""


def show(run: str | None, form: Form) -> Shown:
    """Return the report of a run.

    Raises:
        CliError: if there is no such run.
        JournalError: if nothing of its journal can be trusted.
    """
    state, damage = runs.state_of(Follower(runs.folder_of(run)))
    told = report(state)
    text = as_json(told).decode().rstrip("\n") if form is Form.JSON else words(told)
    return Shown(text, told, damage)


def words(told: Report) -> str:
    """Return a report for people."""
    digest = told.final_state_digest or "not known until every rank is done"
    lines = [
        *facts(
            [
                ("Run", told.run),
                ("State", told.state),
                ("Reason", told.reason),
                ("Step", f"{told.final_step} of {told.steps}"),
                ("State digest", digest),
                (
                    "Losses digest",
                    f"{told.losses_digest} ({units.count(len(told.losses), 'step')})",
                ),
                ("Reduction", told.reduction),
                ("ETTR", units.percent(told.ettr)),
                ("Replicas", _replicas(told)),
                ("Wall clock", units.seconds(told.wall_s)),
                ("Generations", f"{told.generations} ({_counted(told.rungs)})"),
                ("Controllers", str(told.controllers)),
                ("False alarms", str(told.false_alarms)),
            ]
        ),
        *section("Spent", ledger_lines(told.ledger)),
        *section(
            "Incidents",
            [f"{units.clock(i.began_s)}  {incident_line(i)}" for i in told.incidents],
        ),
        *section("Faults injected", [fault_line(fault) for fault in told.faults]),
        *section(
            "Saves that failed or were passed over",
            [f"{units.clock(f.at_s)}  step {f.step}: {f.reason}" for f in told.save_failures],
        ),
        *section("Not to be trusted", _doubts(told)),
    ]
    return units.printable("\n".join(lines))


def _replicas(told: Report) -> str:
    if told.replicas_least == told.replicas:
        return str(told.replicas)
    return f"{told.replicas}; {told.replicas_least} at the least"


def _counted(rungs: dict[str, int]) -> str:
    return ", ".join(f"{rung} {count}" for rung, count in rungs.items()) or "none"


def incident_line(incident: IncidentReport) -> str:
    """Return an incident in one line: what, whom, how it was dealt with and how long that took."""
    text = f"{incident.id}  {incident.kind}  {', '.join(incident.suspects) or 'nobody named'}"
    if incident.rung == "none":
        text += f"  {units.first_line(incident.reason)}"
    else:
        text += f"  {incident.rung or 'nothing done yet'}"
    if incident.first_step_after_s and incident.rung != "none":
        text += f"; training again after {units.seconds(incident.first_step_after_s)}"
    if incident.lost_steps:
        text += f", {units.count(incident.lost_steps, 'step')} again"
    return text + ("; FALSE ALARM" if incident.false_alarm else "")


def fault_line(fault: FaultReport) -> str:
    """Return a planned fault in one line, with what found it."""
    found = (
        f"found by {fault.found_by} after {units.seconds(fault.found_after_s)}"
        if fault.found_by
        else "no incident"
    )
    return f"{units.clock(fault.at_s)}  {fault.description}: {found}"


def _doubts(told: Report) -> list[str]:
    doubts = [f"step {s} gave another loss when computed again" for s in told.divergences]
    doubts += [f"step {s} had other bits when computed again" for s in told.digests_differ]
    doubts += [f"step {step} was reported by nobody" for step in told.losses_missing]
    doubts += [
        f"rank {rank} ended in another state than its replica" for rank in told.replicas_differ
    ]
    return doubts


def verdict_words(disturbed: Report, differences: list[str]) -> str:
    """Return what a drill showed: the report of the disturbed run, and how its twin differs."""
    if differences:
        verdict = "NOT IDENTICAL to the undisturbed twin:"
        return "\n".join([words(disturbed), "", verdict, *(f"  {text}" for text in differences)])
    return (
        f"{words(disturbed)}\n\nBIT-IDENTICAL to the undisturbed twin: weights, optimizer state, "
        f"data cursor, and the loss of every step"
    )


# Replay ---------------------------------------------------------------------------------------


class Replay(msgspec.Struct, frozen=True):
    """What came of a replay."""

    same: bool
    text: str


def replay(run: str | None) -> Replay:
    """Feed the events of a journal to a fresh controller, and compare its decisions.

    Raises:
        CliError: if there is no such run.
        JournalError: if its journal is damaged.
    """
    folder = runs.folder_of(run)
    read = _read(folder)
    decisions = sum(len(entry.decisions) for entry in read.entries)
    counted = f"{units.count(len(read.entries), 'event')}, {units.count(decisions, 'decision')}"
    mismatches = journal.replay(compose.controller(read.header.run), read.entries)
    torn = f"\n{read.torn}; it is not counted" if read.torn else ""
    if not mismatches:
        return Replay(True, f"{counted}, byte for byte the same{torn}")
    first = mismatches[0]
    event = read.entries[first.seq - 1].event
    at = _parting(first.recorded, first.replayed)
    text = (
        f"{counted}, {len(mismatches)} differ; the first is event {first.seq} "
        f"({story.kind(event)}: {units.first_line(story.words(event))}), from byte {at} on\n"
        f"recorded: {_around(first.recorded, at)}\nreplayed: {_around(first.replayed, at)}{torn}"
    )
    return Replay(False, units.printable(text))


def _read(folder: RunFolder) -> journal.Journal:
    try:
        return journal.read(folder.journal.read_bytes())
    except journal.JournalError as error:
        raise CliError(f"{error}: {folder.journal}", error.hint) from error


def _parting(one: bytes, other: bytes) -> int:
    """Return the index of the first byte in which two texts differ."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _around(data: bytes, at: int) -> str:
    start = max(at - 60, 0)
    piece = data[start : at + 120].decode(errors="replace")
    return f"{'...' if start else ''}{piece}{'...' if at + 120 < len(data) else ''}"
