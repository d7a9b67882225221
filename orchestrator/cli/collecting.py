"""Says what in a store need not be kept, and deletes it once somebody agreed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import typer

from orchestrator.cli import units
from orchestrator.cli.choices import Form
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.stored import Store, opened, required
from orchestrator.cli.tables import grid, in_json
from orchestrator.cli.verifying import Gauge, gauge
from storage.blob import BlobStore, LeftOver, Sweepable
from storage.catalog import Catalog, CommitRecord
from storage.errors import StorageRefusedError
from storage.manifest import Manifest
from storage.retention import Ladder
from storage.verdicts import Trust, Where

__all__ = [
    "Ladder",
    "collect",
    "gauge",
    "opened",
    "plan",
    "require_consent",
    "require_whole",
    "told",
]
LEFT_OVER_S = 3600.0
"""What nobody has worked on for so long is of a writer that died."""


@dataclass(frozen=True, slots=True)
class Collection:
    """What is kept, and what goes or went.

    Attributes:
        kept: by step and epoch, why.
        going: the checkpoints that go.
        leased: those that would, and that somebody reads just now.
        orphans: generations that were never committed and can not be any more.
        unfinished: files and uploads of writers that died, which go or went too.
        whole: the checkpoint that was read and found whole before anything may go; None if no
            checkpoint is, and so nothing goes.
        refused: why each that is newer than that, or each of all, was not taken for whole.
        damaged: whether one of these is damaged, and not only barred or of another version.
        unknown: why it is not known which these are; "" if it is.
        done: whether it was done, or only planned.
    """

    kept: dict[Where, str]
    going: tuple[Where, ...]
    leased: tuple[Where, ...]
    orphans: tuple[Where, ...]
    whole: Manifest | None
    refused: dict[Where, str]
    damaged: bool = False
    unfinished: tuple[LeftOver, ...] = ()
    unknown: str = ""
    done: bool = False


def plan(store: Store, ladder: Ladder, gauge: Gauge) -> Collection:
    """Return what would be done. Reads the newest checkpoint: nothing may go if none is whole.

    Raises:
        CliError: if there is no checkpoint, or none can be read without another key.
    """
    records = required(store)
    catalog = store.catalog
    newest, _ = catalog.newest_trusted(at_least=Trust.WRITTEN)
    if newest is not None:
        gauge.begin(f"step {newest.step}", newest.size)
    whole, rejections = Catalog(_Watched(store.blobs, gauge)).newest_verified()
    refused = {(one.step, one.epoch): one.reason for one in rejections}
    planned = catalog.plan(ladder, verified=whole) if whole else None
    if planned is None:
        return Collection({}, (), (), (), None, refused, damaged=_damaged(catalog, records))
    held = store.leases.all_held()
    unfinished, unknown = _unfinished(store)
    return Collection(
        planned.kept,
        tuple(where for where in planned.victims if where not in held),
        tuple(where for where in planned.victims if where in held),
        tuple(catalog.orphans()),
        whole,
        refused,
        unfinished=unfinished,
        unknown=unknown,
    )


def _unfinished(store: Store) -> tuple[tuple[LeftOver, ...], str]:
    """Return what would be swept, or why that is not known."""
    try:
        sweepable = _sweepable(store)
        return tuple(sweepable.left_over(LEFT_OVER_S)) if sweepable else (), ""
    except StorageRefusedError as error:
        # Of a folder one has to write to, to know how old files are in it by its own clock. Who may
        # only read is told the rest.
        return (), str(error)


def _sweepable(store: Store) -> Sweepable | None:
    inner = getattr(store.blobs, "inner", store.blobs)
    return inner if isinstance(inner, Sweepable) else None


def require_whole(planned: Collection) -> None:
    """End with what was planned if that is nothing, since no checkpoint is whole.

    Raises:
        typer.Exit: with the exit code for damage, if that is why.
    """
    if planned.whole is None:
        raise typer.Exit(Exit.DAMAGED if planned.damaged else Exit.ERROR)


def _damaged(catalog: Catalog, records: list[CommitRecord]) -> bool:
    """Return whether one of the checkpoints, none of which is whole, should be."""
    barred = catalog.barred()
    return any(
        (one.step, one.epoch) not in barred and not (one.superseded or one.unsupported)
        for one in records
    )


def require_consent(planned: Collection, uri: str) -> None:
    """Ask whoever sits at the terminal.

    Raises:
        CliError: if nobody does.
        typer.Exit: if it is declined.
    """
    if not (planned.going or planned.orphans):
        return
    if not sys.stdin.isatty():
        going = [units.count(len(planned.going), "checkpoint")] if planned.going else []
        if planned.orphans:
            going.append(f"{units.count(len(planned.orphans), 'generation')} without a commit")
        raise CliError(
            f"{' and '.join(going)} would be deleted: {uri}",
            "look at it with --dry-run, and agree with --yes",
            Exit.USAGE,
        )
    if not typer.confirm("Delete them?", err=True):
        raise typer.Exit(Exit.ERROR)


def collect(store: Store, ladder: Ladder, planned: Collection) -> Collection:
    """Do what was planned and nothing else, since nobody saw anything else when they agreed.

    What came to be leased meanwhile stays, and so does what the ladder came to need, as when a
    newer checkpoint was quarantined.
    """
    # First: if it fails, nothing is gone yet of which nobody would be told.
    sweepable = _sweepable(store)
    swept = tuple(sweepable.sweep_old(LEFT_OVER_S)) if sweepable else ()
    gone = store.catalog.retain(
        ladder,
        verified=planned.whole,
        leases=store.leases,
        agreed={*planned.going, *planned.orphans},
    )
    stayed = {where for where in planned.going if where not in gone}
    read = stayed & store.leases.all_held()
    still = set(store.catalog.orphans())
    return replace(
        planned,
        kept={**planned.kept, **dict.fromkeys(sorted(stayed - read), "needed by now")},
        going=tuple(gone),
        leased=tuple(sorted({*planned.leased, *read})),
        orphans=tuple(where for where in planned.orphans if where not in still),
        unfinished=swept,
        unknown="",
        done=True,
    )


class _Watched:
    """Tells a gauge what is read from a store."""

    def __init__(self, inner: BlobStore, gauge: Gauge) -> None:
        self._inner, self._gauge = inner, gauge
        self.put, self.size = inner.put, inner.size
        self.keys, self.delete = inner.keys, inner.delete

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`."""
        data = self._inner.get(key, start, length)
        self._gauge.read(len(data))
        return data


def told(came: Collection, output: Form) -> str:
    """Return a collection in the asked form."""
    if output is Form.JSON:
        return in_json(
            {
                "done": came.done,
                "whole": _name((came.whole.step, came.whole.epoch)) if came.whole else None,
                "refused": [
                    {"name": _name(where), "why": why} for where, why in came.refused.items()
                ],
                "kept": [
                    {"name": _name(where), "why": why}
                    for where, why in sorted(came.kept.items(), reverse=True)
                ],
                "deleted": [_name(where) for where in came.going],
                "leased": [_name(where) for where in came.leased],
                "orphans": [_name(where) for where in came.orphans],
                "unfinished": [{"name": left.name, "bytes": left.size} for left in came.unfinished],
                "unfinishedUnknown": came.unknown or None,
                "swept": len(came.unfinished) if came.done else None,
            }
        )
    if came.whole is None:
        lines = ["nothing goes: no checkpoint is whole, and so whatever is there is the last hope"]
        cells = [[_name(where), why] for where, why in came.refused.items()]
        return units.printable("\n".join([*lines, "", grid(["NAME", "WHY NOT"], cells)]))
    verb = "deleted" if came.done else "to delete"
    rows = [(where, "kept", why) for where, why in came.kept.items()]
    rows += [(where, verb, "") for where in came.going]
    rows += [(where, "kept", "somebody reads it") for where in came.leased]
    rows += [(where, verb, "never committed") for where in came.orphans]
    cells = [[_name(where), what, why or "-"] for where, what, why in sorted(rows, reverse=True)]
    lines = [grid(["NAME", "IS", "WHY"], cells)]
    if came.unknown:
        lines += ["", f"which files are unfinished is not known: {came.unknown}"]
    if came.unfinished:
        size = units.size(sum(left.size for left in came.unfinished))
        files = units.count(len(came.unfinished), "unfinished file")
        lines += ["", f"{verb}: {files} of dead writers, {size}"]
        lines += [grid(["NAME", "SIZE"], [[n, units.size(size)] for n, size in came.unfinished])]
    return units.printable("\n".join(lines))


def _name(where: Where) -> str:
    return f"{where[0]}@{where[1]}"
