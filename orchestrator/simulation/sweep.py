"""Sweeps: one experiment over a grid of settings, as a file."""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from orchestrator import document
from orchestrator.document import BadFileError
from orchestrator.faults.sections import ClassName, Section
from orchestrator.simulation.settings import Settings

CELLS_MAX = 10_000


class Sweep(Section, frozen=True, kw_only=True):
    """A sweep file: what is the same in every cell of the grid, and what is not."""

    kind: Literal["Sweep"]
    api_version: Literal["holdfast.dev/v1alpha1"] = "holdfast.dev/v1alpha1"
    name: ClassName
    base: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it
    """Settings of every cell, as options of `holdfast simulate` in camelCase: gpus, saveEvery."""
    grid: Annotated[dict[str, list[Any]], msgspec.Meta(min_length=1)]
    """Settings with their values; every combination is a cell."""
    seeds: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1
    """Runs of each cell."""
    first: Annotated[int, msgspec.Meta(ge=0)] = 0
    """The first seed; cells have the same ones, so that they differ by what was changed."""


class Cell(NamedTuple):
    """One combination."""

    number: int
    varied: dict[str, Any]
    """Of the grid: name and value."""
    settings: Settings


def parse(text: str, where: str) -> tuple[Sweep, list[Cell]]:
    """Read a sweep; return it with its cells, in the order of the grid, the last name fastest.

    Raises:
        BadFileError: if it is none, or a cell is not what settings can be.
    """
    sweep = document.shape(document.fields(text, "Sweep", where), Sweep, where)
    known = [field.encode_name for field in msgspec.structs.fields(Settings)]
    for section, names in (("base", sweep.base), ("grid", sweep.grid)):
        for name in names:
            if name not in known:
                raise BadFileError(
                    document.printable(f"{section} has no setting {name!r}: {where}"),
                    f"there are: {', '.join(known)}",
                )
    both = sorted(sweep.base.keys() & sweep.grid.keys())
    if both:
        raise BadFileError(
            f"{both[0]} is in base and in grid, expected in one of them: {where}",
            "leave it out of base",
        )
    empty = [name for name, values in sweep.grid.items() if not values]
    if empty:
        raise BadFileError(
            f"grid.{empty[0]} has no values, expected one at least: {where}",
            "write for example [0, 2, 4]",
        )
    for name, values in sweep.grid.items():
        if any(value in values[:n] for n, value in enumerate(values)):
            raise BadFileError(
                f"grid.{name} has a value twice, expected each once: {where}",
                "more seeds are `seeds:`",
            )
    combined = [
        dict(zip(sweep.grid, values, strict=True)) for values in product(*sweep.grid.values())
    ]
    if len(combined) > CELLS_MAX:
        raise BadFileError(
            f"grid has {len(combined)} cells, expected at most {CELLS_MAX}: {where}",
            "fewer values, or two sweeps",
        )
    cells = [
        Cell(number, varied, _settings({**sweep.base, **varied}, number, where))
        for number, varied in enumerate(combined)
    ]
    return sweep, cells


def _settings(fields: dict[str, Any], number: int, where: str) -> Settings:
    return document.shape(fields, Settings, f"cell {number} of {where}")
