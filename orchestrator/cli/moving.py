"""Takes checkpoints out of a store, as safetensors or in torch's own format, and brings them in."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from orchestrator.cli import units
from orchestrator.cli.choices import Form
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.stored import Store, name_of, opened, picked, readable, required
from orchestrator.cli.tables import in_json
from orchestrator.cli.verifying import Gauge, bytes_of, gauge, leased
from storage import distcp, transfer
from storage.catalog import CommitRecord
from storage.contents import read_contents
from storage.errors import ForbiddenPickleError, ForeignFormatError, UnstorableError
from storage.manifest import STEP_MAX
from storage.shard import ITEM_BYTES
from storage.verdicts import DELETING, Standing, standing_of

if TYPE_CHECKING:
    from storage.contents import Beside
    from storage.transfer import Part

DCP, SAFETENSORS = "dcp", "safetensors"
__all__ = ["bring_in", "bytes_of", "gauge", "opened", "take_out", "told"]


def take_out(
    store: Store, name: str | None, out: Path, form: str, file_bytes: int, gauge: Gauge
) -> dict[str, object]:
    """Write a checkpoint to a new folder; return what came of it."""
    _require_form(form)
    record = picked(store, name) if name is not None else _newest(store)
    manifest = readable(store, record)
    with leased(store, record.step, record.epoch, holder="export"):
        standing = _require_kept(store, record)
        contents = read_contents(store.blobs, manifest)
        sizes = [math.prod(t.shape) * ITEM_BYTES[t.dtype] for t in contents.tensors.values()]
        gauge.begin(f"step {record.step}", sum(sizes))
        try:
            if form == DCP:
                _require_torch("the format dcp")
                from storage.dcp.folder import export_dcp

                export_dcp(store.blobs, contents, out, read=gauge.read)
            else:
                transfer.export_safetensors(
                    store.blobs, contents, out, file_bytes=file_bytes, read=gauge.read
                )
        except FileExistsError as error:
            raise CliError(
                f"something is there already: {error.filename or out}",
                "choose a folder that is not there yet",
                Exit.USAGE,
            ) from error
    return {
        "checkpoint": name_of(record),
        "state": standing.kind or "readable",
        "to": units.encodable(str(out)),
        "format": form,
        "tensors": len(sizes),
        "bytes": sum(sizes),
        "values": len(contents.values),
    }


def bring_in(
    store: Store, folder: Path, step: int, run_id: str, shard_bytes: int, gauge: Gauge
) -> dict[str, object]:
    """Make a checkpoint of what a folder holds; return what came of it."""
    if not 0 <= step <= STEP_MAX:
        raise CliError(f"step is {step}, expected 0 to {STEP_MAX}", "see --step", Exit.USAGE)
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "there is no folder"
        raise CliError(f"{what}: {folder}", "give the folder to be brought in", Exit.USAGE)
    parts, beside, form = _found(folder)
    records = store.catalog.commits()
    foreign = sorted({r.manifest.run_id for r in records if r.manifest} - {run_id})
    if foreign:
        raise CliError(
            f"store has checkpoints of run {foreign[0]}, expected {run_id} or none: {store.uri}",
            "a store belongs to one run; bring it into another one, or name the run with --run",
            Exit.USAGE,
        )
    if any(record.step == step for record in records):
        raise CliError(
            f"there is a checkpoint of step {step} already: {store.uri}",
            "choose another step, or another store",
            Exit.USAGE,
        )
    size = sum(part.size for part in parts)
    gauge.begin(folder.name, size)
    manifest = transfer.bring_in(
        store.blobs,
        parts,
        beside,
        step=step,
        run_id=run_id,
        shard_bytes=shard_bytes,
        read=gauge.read,
        left=lambda words: typer.echo(units.printable(words), err=True),
    )
    return {
        "checkpoint": f"{manifest.step}@{manifest.epoch}",
        "from": units.encodable(str(folder)),
        "format": form,
        "tensors": len({part.name for part in parts}),
        "bytes": size,
        "values": len(beside.values),
        "shards": manifest.shards,
    }


def told(came: dict[str, object], output: Form) -> str:
    """Return what came of it in the asked form."""
    if output is Form.JSON:
        return in_json(came)
    size, state = came["bytes"], came.get("state", "readable")
    assert isinstance(size, int)
    which = f"{came['checkpoint']}, {state}," if state != "readable" else came["checkpoint"]
    way = f"is in {came['to']}" if "to" in came else f"was made of {came['from']}"
    return units.printable(
        f"checkpoint {which} {way}, format {came['format']}: {came['tensors']} "
        f"tensors of {units.size(size)}, {came['values']} other values"
    )


def _newest(store: Store) -> CommitRecord:
    """Return the newest checkpoint that nothing bars: who asks for no other wants to use it.

    Raises:
        CliError: if each is barred.
    """
    records, barred = required(store), store.catalog.barred()
    for record in records:
        if not record.superseded and (record.step, record.epoch) not in barred:
            return record
    raise CliError(
        f"every checkpoint is barred, the newest is {name_of(records[0])}: {store.uri}",
        "`holdfast checkpoint show` says why; name one with --step to have it all the same",
    )


def _require_kept(store: Store, record: CommitRecord) -> Standing:
    """Return the standing of a checkpoint that is leased; of one that goes, a lease keeps nothing.

    Raises:
        CliError: if it is being deleted.
    """
    standing = standing_of(store.blobs, record.step, record.epoch)
    if standing.kind == DELETING:
        raise CliError(
            f"checkpoint {name_of(record)} is being deleted: {store.uri}",
            "`holdfast checkpoint ls` lists the others",
        )
    return standing


def _found(folder: Path) -> tuple[list[Part], Beside, str]:
    reading: dict[str, Callable[[], tuple[list[Part], Beside]]] = {
        DCP: lambda: _of_dcp(folder),
        SAFETENSORS: lambda: transfer.parts_of_safetensors(folder),
    }
    for path in folder.iterdir():
        # Opening a pipe would wait for a writer, for ever.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ForeignFormatError(f"neither file nor folder: {path}")
    if distcp.is_one(folder):
        form = DCP
    elif any(folder.glob("*.safetensors")):
        form = SAFETENSORS
    else:
        raise CliError(
            f"no .metadata and no *.safetensors: {folder}",
            "expected a folder that torch.distributed.checkpoint made, or one of safetensors",
            Exit.USAGE,
        )
    try:
        parts, beside = reading[form]()
    except (ForbiddenPickleError, UnstorableError) as error:
        raise CliError(units.printable(str(error)), error.hint, Exit.USAGE) from error
    return parts, beside, form


def _of_dcp(folder: Path) -> tuple[list[Part], Beside]:
    distcp.described(folder)  # what is wrong with it takes no torch to say
    _require_torch("a folder of torch.distributed.checkpoint")
    from storage.dcp.folder import parts_of_dcp

    return parts_of_dcp(folder)


def _require_form(form: str) -> None:
    if form not in (DCP, SAFETENSORS):
        raise CliError(
            f"format is {form!r}, expected {DCP} or {SAFETENSORS}", "see --format", Exit.USAGE
        )


def _require_torch(what: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise CliError(
            f"torch is not installed, and {what} needs it", "pip install 'holdfast[train]'"
        )
