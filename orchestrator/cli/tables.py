"""The five ways in which a list of things is printed: table, wide, json, yaml, name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import yaml

from orchestrator.cli import units
from orchestrator.cli.choices import Output
from orchestrator.core.state import RunState
from orchestrator.worlds.folder import RunFolder

Row = dict[str, Any]
"""A thing as a plain object, just as it goes out as JSON; `name` is always there."""
CELL_MAX = 80


class Column(NamedTuple):
    """One column: its title with the unit, the field it shows, and how."""

    title: str
    key: str
    show: Callable[[Any], str] = str
    wide: bool = False


class Kind(NamedTuple):
    """A kind of thing in a run."""

    name: str
    """In the singular."""
    columns: tuple[Column, ...]
    rows: Callable[[RunState, RunFolder], list[Row]]


def text(value: object) -> str:
    """Return a value as a cell: "-" for nothing, lists with commas."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)


def span(value: float | None) -> str:
    """Return seconds as a cell; the unit stands in the column's title."""
    return "-" if value is None else f"{value:.2f}"


def percent(value: float) -> str:
    """Return a ratio as a cell; the unit stands in the column's title."""
    return f"{value * 100:.1f}"


def rendered(kind: str, columns: Sequence[Column], rows: Sequence[Row], output: Output) -> str:
    """Return rows in the asked form.

    Args:
        kind: what a row is, in the singular; `-o name` prints `kind/name`.
        columns: of the table.
        rows: in the order to be shown.
        output: the form.
    """
    match output:
        case Output.JSON:
            return in_json(list(rows))
        case Output.YAML:
            return in_yaml(list(rows))
        case Output.NAME:
            # A checkpoint has a row for each tier that it is on, and one name.
            return "\n".join(dict.fromkeys(f"{kind}/{row['name']}" for row in rows))
        case Output.TABLE | Output.WIDE:
            shown = [c for c in columns if output is Output.WIDE or not c.wide]
            return grid(
                [c.title for c in shown],
                [[_cell(c.show(row[c.key]), output) for c in shown] for row in rows],
            )


def in_json(told: object) -> str:
    """Return an answer as JSON, to be read by a program or a person."""
    return msgspec.json.format(msgspec.json.encode(told), indent=2).decode()


def in_yaml(told: object) -> str:
    """Return an answer as YAML."""
    plain = msgspec.to_builtins(told)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip("\n")


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns, two spaces apart."""
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: str, output: Output) -> str:
    line = units.printable(units.first_line(value)).replace("\t", " ")
    if output is Output.TABLE and len(line) > CELL_MAX:
        return f"{line[: CELL_MAX - 3]}..."
    return line or "-"
