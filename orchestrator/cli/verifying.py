"""Reads checkpoints of a store back, with a gauge, and tells what is damaged."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import typer

from orchestrator.cli import units
from orchestrator.cli.blocks import section
from orchestrator.cli.choices import Form
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.stored import Store, opened, picked, require_judged, required
from orchestrator.cli.tables import in_json
from storage.catalog import Catalog, CommitRecord
from storage.errors import StorageError, StorageFullError, StorageRefusedError
from storage.scrub import Examined, due, examine, is_there, scrub_all, unread
from storage.verdicts import DELETING
from storage.wrappers import ThrottledStore

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["bytes_of", "gauge", "leased", "opened", "scrub", "tell", "verify"]
LEASE_S = 6 * 3600.0
DAMAGES_SHOWN = 50
_SIZE = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)\s*(KiB|MiB|GiB|B)")
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class Gauge(Protocol):
    """Shows how far reading has come."""

    def begin(self, what: str, total_bytes: int) -> None:
        """Begin with something of this size."""
        ...

    def read(self, read_bytes: int) -> None:
        """So much more was read."""
        ...


@contextmanager
def gauge(*, quiet: bool) -> Iterator[Gauge]:
    """Show a bar on standard error while this is open, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    shown = not quiet and sys.stderr.isatty()
    with Progress(*columns, TransferSpeedColumn(), console=console, disable=not shown) as progress:
        yield _Bars(progress)


class _Bars:
    def __init__(self, progress: object) -> None:
        from rich.progress import Progress

        assert isinstance(progress, Progress)
        self._progress = progress
        self._task: TaskID | None = None

    def begin(self, what: str, total_bytes: int) -> None:
        """See `Gauge.begin`."""
        self._task = self._progress.add_task(what, total=total_bytes)

    def read(self, read_bytes: int) -> None:
        """See `Gauge.read`."""
        if self._task is not None:
            self._progress.advance(self._task, read_bytes)


def verify(store: Store, name: str | None, *, everything: bool, gauge: Gauge) -> list[Examined]:
    """Read one checkpoint, or all, and return what came of it; nothing is put on record."""
    if everything and name is not None:
        raise CliError(
            f"--all was given, and checkpoint {name}", "give one or the other", Exit.USAGE
        )
    if not everything:
        record = picked(store, name)
        require_judged(store, record)
        examined = _verify(store, record, gauge)
        if examined is None:
            raise CliError(
                f"checkpoint {record.step}@{record.epoch} was deleted meanwhile: {store.uri}",
                "the run or a collection needs it no longer; verify a newer one",
            )
        return [examined]
    all_records, standings = required(store), store.catalog.standings()
    going = {where for where, one in standings.items() if one.kind == DELETING}
    records = [
        record
        for record in all_records
        if not record.superseded and (record.step, record.epoch) not in going
    ]
    # Reading them all takes long; a run deletes some of them before their turn comes.
    came = (_verify(store, record, gauge) for record in records)
    return [examined for examined in came if examined is not None]


def scrub(store: Store, *, rate: str | None, again: bool, gauge: Gauge) -> list[Examined]:
    """Verify what is not verified, and judge it; see `storage.scrub.scrub_all`.

    Each is leased while it is read, lest a run collects it half-way.
    """
    required(store)
    blobs = store.blobs if rate is None else ThrottledStore(store.blobs, _rate(rate))
    catalog = Catalog(blobs)
    records = due(catalog, again=again)
    gauge.begin("scrubbing", sum(one.manifest.size for one in records if one.manifest))
    reading = partial(leased, store, holder="scrub")
    try:
        return list(scrub_all(catalog, again=again, read=gauge.read, reading=reading))
    except (StorageRefusedError, StorageFullError) as error:
        raise CliError(
            units.printable(f"what was found can not be put on record: {error}"),
            f"{error.hint} `holdfast checkpoint verify --all` reads as much and writes nothing.",
        ) from error


def tell(told: list[Examined], output: Form) -> None:
    """Print what came of it.

    Raises:
        typer.Exit: with the exit code for damage, if there is any.
    """
    bad = [one for one in told if one.damages or (one.fault and not one.unsupported)]
    typer.echo(
        in_json({"checkpoints": told, "bad": len(bad)}) if output is Form.JSON else _in_words(told)
    )
    if bad:
        raise typer.Exit(Exit.DAMAGED)
    if any(one.unsupported for one in told):
        raise typer.Exit(Exit.ERROR)


def _verify(store: Store, record: CommitRecord, gauge: Gauge) -> Examined | None:
    """Read a checkpoint; return None if it was collected before that was done."""
    step, epoch, manifest = record.step, record.epoch, record.manifest
    if manifest is None:
        return unread(record)
    gauge.begin(f"step {step}", manifest.size)
    with leased(store, step, epoch, holder="verify"):
        damages = examine(store.blobs, manifest, read=gauge.read)
        if damages and not is_there(store.blobs, manifest):
            return None
    return Examined(step=step, epoch=epoch, damages=tuple(damages))


@contextmanager
def leased(store: Store, step: int, epoch: int, *, holder: str) -> Iterator[None]:
    """Keep a checkpoint from being collected while it is read, if the store can be written."""
    try:
        key = store.leases.take(step, epoch, holder, LEASE_S)
    except (StorageRefusedError, StorageFullError):
        # Whoever may only read, or has no room, can verify all the same; it may be collected first.
        yield
        return
    try:
        yield
    finally:
        try:
            store.leases.drop(key)
        except StorageError as error:
            # Whoever may not delete has read it all the same; what came of that must not be lost.
            words = f"the lease is not given back, and ends by itself in {LEASE_S / 3600:g} h"
            typer.echo(units.printable(f"{words}: {error}"), err=True)


def bytes_of(text: str, what: str, of: str = "bytes") -> float:
    """Return a number of bytes, or of bytes per second, that is written with its unit.

    Raises:
        CliError: if it is none, or 0.
    """
    match = _SIZE.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise CliError(
            f"{what} is {text!r}, expected {of} with a unit, such as 200MiB",
            "units are B, KiB, MiB and GiB",
            Exit.USAGE,
        )
    return float(match[1]) * _UNITS[match[2]]


def _rate(text: str) -> float:
    return bytes_of(text.removesuffix("/s"), "rate", "bytes per second")


def _in_words(told: list[Examined]) -> str:
    if not told:
        return "nothing to verify: every checkpoint is verified already, or barred; see --again"
    lines = []
    for one in told:
        if one.unsupported:
            verdict = f"not read: {one.fault}"
        elif one.fault:
            verdict = f"unreadable: {one.fault}"
        elif one.damages:
            verdict = f"DAMAGED in {units.count(len(one.damages), 'place')}"
        else:
            verdict = "whole: every byte is what was staged"
        lines.append(f"{one.step}@{one.epoch}  {verdict}")
    damages = [damage for one in told for damage in one.damages]
    for damage in damages[:DAMAGES_SHOWN]:
        where = [f"chunk:     {damage.chunk}"] if damage.chunk else []
        found = [f"expected:  {damage.expected}", f"found:     {damage.found}"]
        lines += section(damage.key, [*where, *found])
    if len(damages) > DAMAGES_SHOWN:
        lines += ["", f"and {len(damages) - DAMAGES_SHOWN} more; -o json has them all"]
    return units.printable("\n".join(lines))
