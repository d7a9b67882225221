"""What is in a store of checkpoints: the list, one of them, and verdicts about it."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from orchestrator.cli import units
from orchestrator.cli.blocks import facts, section
from orchestrator.cli.choices import Form, Output
from orchestrator.cli.errors import CliError, Exit, unknown
from orchestrator.cli.tables import Column, Row, grid, in_json, rendered, text
from storage.address import open_store
from storage.blob import BlobStore
from storage.catalog import Catalog, CommitRecord
from storage.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    UnsupportedUriError,
    UnsupportedVersionError,
)
from storage.leases import Leases
from storage.local import LocalStore
from storage.manifest import Manifest, commit_key
from storage.verdicts import Standing, reason_of, standing_of
from storage.wrappers import RetryingStore

ATTEMPTS_MAX = 3
ENCRYPTED = b"HFENC"
"""How a blob begins that is encrypted; to import what writes it takes a library."""


class Store(NamedTuple):
    """A store and its address."""

    uri: str
    blobs: BlobStore
    leases: Leases

    @property
    def catalog(self) -> Catalog:
        """Its checkpoints."""
        return Catalog(self.blobs)


def opened(uri: str, *, new: bool = False) -> Store:
    """Open a store that is there, or, if that is asked for, may be made.

    Raises:
        CliError: if the address can not be one, or there is no such folder.
    """
    try:
        store = open_store(uri)
    except (UnsupportedUriError, ValueError) as error:
        hint = getattr(error, "hint", UnsupportedUriError.hint)
        raise CliError(units.printable(str(error)), hint, Exit.USAGE) from error
    folder = getattr(store, "inner", store)
    if isinstance(folder, LocalStore):
        _require_folder(folder.root, new=new)
    blobs = RetryingStore(store, attempts_max=ATTEMPTS_MAX)
    # Leases end by a clock that the machines of a run share, more or less.
    return Store(uri, blobs, Leases(blobs, time.time))  # noqa: TID251


def _require_folder(root: Path, *, new: bool) -> None:
    if root.exists() and not root.is_dir():
        raise CliError(
            f"not a folder: {root}", "give the folder of a run's checkpoints", Exit.USAGE
        )
    if not new and not root.is_dir():
        # An empty list would look like a run that has saved nothing yet.
        raise CliError(
            f"there is no folder {root}",
            "is the volume mounted? `holdfast describe run` tells where a run saves",
            Exit.USAGE,
        )


def picked(store: Store, name: str | None) -> CommitRecord:
    """Return the checkpoint that is meant by STEP, STEP@EPOCH or step-STEP; the newest for None.

    Raises:
        CliError: if there is none.
    """
    records = required(store)
    if name is None:
        return records[0]
    for record in records:
        if name in {name_of(record), str(record.step), f"step-{record.step}"}:
            return record
    raise unknown("checkpoint", name, [name_of(record) for record in records], store.uri)


def required(store: Store) -> list[CommitRecord]:
    """Return all checkpoints, newest first.

    Raises:
        CliError: if there is none, or what all of them need is a key.
        WrongKeyError: if what all of them need is another key.
    """
    require_any(store)
    return keyed(store)


def keyed(store: Store) -> list[CommitRecord]:
    """Return all checkpoints, newest first; there may be none.

    Raises:
        CliError, WrongKeyError: if what all of them need is a key, or another one.
    """
    records = store.catalog.commits()
    if records and not any(record.manifest or record.unsupported for record in records):
        _require_key(store, commit_key(records[0].step, records[0].epoch))
    return records


def require_any(store: Store) -> None:
    """Check that there are checkpoints.

    Raises:
        CliError: if there is none: the address is wrong, more likely than not.
    """
    if not store.catalog.known():
        raise CliError(
            f"there is no checkpoint: {store.uri}",
            "see that the address is that of a run's checkpoints, and not of its folder",
        )


def _require_key(store: Store, key: str) -> None:
    """Tell a store of which no record can be read from one to which no, or a wrong, key was given.

    One record may be damaged in that way; that all are is the key's fault, more likely than not.
    """
    with suppress(BlobNotFoundError, BlobCorruptError):
        if store.blobs.get(key, 0, len(ENCRYPTED)) == ENCRYPTED:
            raise CliError(
                f"checkpoints are encrypted, and the address names no key: {store.uri}",
                "add ?encrypt=NAME to it, the environment variable that holds the key",
                Exit.USAGE,
            )


def require_judged(store: Store, record: CommitRecord) -> None:
    """Check that a checkpoint can be looked into: none stands for it, and its version is known.

    Raises:
        CliError: if not. That is no damage.
    """
    name = name_of(record)
    if record.superseded:
        raise CliError(
            f"checkpoint {name} is {record.fault}: {store.uri}",
            f"`{record.step}` alone means the one that stands for it",
            Exit.USAGE,
        )
    if record.unsupported:
        key = commit_key(record.step, record.epoch)
        raise CliError(f"{record.fault}: {key}", UnsupportedVersionError.hint)


def readable(store: Store, record: CommitRecord) -> Manifest:
    """Return a checkpoint's manifest.

    Raises:
        CliError: if its record can not be read; with the exit code for damage if it is damaged.
    """
    require_judged(store, record)
    if record.manifest is None:
        key = commit_key(record.step, record.epoch)
        where = "" if key in record.fault else f": {key}"
        raise CliError(
            units.printable(f"the commit record can not be read: {record.fault}{where}"),
            "`holdfast checkpoint ls` lists those that can",
            Exit.DAMAGED,
        )
    return record.manifest


def name_of(record: CommitRecord) -> str:
    """Return the name by which a checkpoint is told from all others."""
    return f"{record.step}@{record.epoch}"


def row(record: CommitRecord, standing: Standing, *, leased: bool) -> Row:
    """Return a checkpoint as a plain object."""
    manifest = record.manifest
    return {
        "name": name_of(record),
        "step": record.step,
        "epoch": record.epoch,
        "state": standing.kind or _state(record),
        "trust": standing.trust.words,
        "shards": manifest.shards if manifest else None,
        "bytes": manifest.size if manifest else None,
        "leased": leased,
        "run": manifest.run_id if manifest else "",
        "model": manifest.model if manifest else "",
        "fault": record.fault,
    }


def _state(record: CommitRecord) -> str:
    if record.superseded:
        return "superseded"
    if record.unsupported:
        return "unsupported"
    return "readable" if record.manifest else "unreadable"


COLUMNS = (
    Column("NAME", "name"),
    Column("STATE", "state"),
    Column("TRUST", "trust"),
    Column("SHARDS", "shards", text),
    Column("SIZE", "bytes", lambda value: "-" if value is None else units.size(value)),
    Column("RUN", "run", text),
    Column("LEASED", "leased", lambda value: "yes" if value else "no", wide=True),
    Column("MODEL", "model", text, wide=True),
    Column("FAULT", "fault", text, wide=True),
)


def listed(store: Store, output: Output) -> str:
    """Return the list of checkpoints."""
    records = keyed(store)
    standings, leased = store.catalog.standings(), store.leases.all_held()
    rows = [
        row(
            record,
            standings.get((record.step, record.epoch), Standing()),
            leased=(record.step, record.epoch) in leased,
        )
        for record in records
    ]
    return rendered("checkpoint", COLUMNS, rows, output)


def shown(store: Store, name: str | None, output: Form) -> str:
    """Return everything about one checkpoint."""
    record = picked(store, name)
    standing = standing_of(store.blobs, record.step, record.epoch)
    leased = store.leases.held(record.step, record.epoch)
    told = row(record, standing, leased=leased)
    told["key"] = commit_key(record.step, record.epoch)
    told["verdicts"] = [reason_of(store.blobs, key) for key in standing.keys]
    manifest = record.manifest
    told["state_digest"] = manifest.state_digest if manifest else ""
    told["root"] = manifest.root if manifest else ""
    told["layout"] = manifest.layout if manifest else {}
    told["shard_sizes"] = list(manifest.shard_sizes()) if manifest else []
    if output is Form.JSON:
        return in_json(told)
    lines = facts(
        [
            ("Name", told["name"]),
            ("State", told["state"]),
            ("Trust", told["trust"]),
            ("Fault", told["fault"]),
            ("Run", told["run"]),
            ("Model", told["model"]),
            ("Size", f"{units.size(told['bytes'])}, {told['shards']} shards" if manifest else ""),
            ("Leased", "yes" if leased else "no"),
            ("State digest", told["state_digest"]),
            ("Root", told["root"]),
            ("Key", told["key"]),
        ]
    )
    layout = [[key, text(value)] for key, value in told["layout"].items()]
    lines += section("Layout", grid(["AXIS", "VALUE"], layout).splitlines() if layout else [])
    lines += section("Verdicts", told["verdicts"])
    return units.printable("\n".join(lines))


def judged(store: Store, name: str, kind: str, reason: str, output: Form) -> str:
    """Add a verdict about a checkpoint; return what its standing is now."""
    record = picked(store, name)
    key = store.catalog.judge(record.step, record.epoch, kind, units.encodable(reason))
    standing = standing_of(store.blobs, record.step, record.epoch)
    state = standing.kind or "not barred"
    if output is Form.JSON:
        return in_json({"name": name_of(record), "state": state, "verdict": key})
    return units.printable(f"checkpoint {name_of(record)} is {state} now: {key}")
