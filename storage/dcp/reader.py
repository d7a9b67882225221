"""Reads a checkpoint for `torch.distributed.checkpoint.load`, in whatever layout it is wanted.

Of each stored piece only the rows that a rank needs are read, and every byte that is read was
verified.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader as TorchStorageReader
from torch.futures import Future

from storage import contents as held
from storage.blob import BlobStore
from storage.catalog import Catalog
from storage.contents import Contents, Piece
from storage.dcp.items import DTYPES, mapping_of, pickled, tensor_over
from storage.dcp.target import Address, names_step, opened, step_of
from storage.errors import (
    BlobNotFoundError,
    ManifestCorruptError,
    StorageError,
    StorageFullError,
    StorageRefusedError,
)
from storage.leases import Leases
from storage.manifest import Manifest
from storage.ranges import Want, read_ranges
from storage.shard import ITEM_BYTES
from storage.verdicts import reason_of, standing_of

PLANNING_S = 3600.0
"""The coordinator's first lease ends by itself after so long: nobody tells of a load that failed
before anything was read."""
READING_S = 900.0
"""For so long a rank that was killed while it read keeps the checkpoint from being deleted."""
HOLDER = "dcp"

logger = logging.getLogger(__name__)


class StorageReader(TorchStorageReader):
    """Reads a committed checkpoint.

    Args:
        address: of the store.
        step: which, unless `checkpoint_id` says so; the newest that can be read and is not barred
            if neither does. All ranks must find the same one.
    """

    def __init__(self, address: Address, *, step: int | None = None) -> None:
        self._address, self._step = address, step
        self._contents: Contents | None = None
        self._rank = 0
        self._lease = ""

    @property
    def manifest(self) -> Manifest:
        """The checkpoint that was found, once `load` has looked for it."""
        return self._held.manifest

    @property
    def _held(self) -> Contents:
        if self._contents is None:
            raise ValueError("no checkpoint was read yet, expected read_metadata before this")
        return self._contents

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin with a checkpoint; see `target.step_of` for what the id means."""
        self._contents = None
        if checkpoint_id is not None:
            self._step = step_of(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether an id has a step in it."""
        return names_step(checkpoint_id)

    # Not called `kwargs`: torch would ask again, for the metadata of a rank, which we do not have.
    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:  # noqa: ANN401 - torch's signature
        """Return what the checkpoint holds.

        Raises:
            BlobNotFoundError: if there is no such checkpoint.
            StorageRefusedError: if a verdict bars it.
            ManifestCorruptError, ShardCorruptError: if its record or an index is damaged.
        """
        store = opened(self._address)
        self._contents = held.read_contents(store, found(Catalog(store), self._step))
        return metadata_of(self._contents)

    def set_up_storage_reader(
        self,
        metadata: Metadata,  # noqa: ARG002 - torch's signature
        is_coordinator: bool,  # noqa: FBT001 - the same
        *_args: Any,  # noqa: ANN401 - the same
        **kwargs: Any,  # noqa: ANN401 - the same
    ) -> None:
        """Take up the rank's part; the coordinator keeps the checkpoint from being collected.

        Raises:
            StorageRefusedError: if it is being collected already.
        """
        self._rank = int(kwargs.get("rank", 0))
        if is_coordinator:
            self._lease = _lease(opened(self._address), self.manifest)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Say in the plan which checkpoint this rank found."""
        plan.storage_data = (self.manifest.step, self.manifest.epoch, self.manifest.root)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Check that all ranks found the same checkpoint.

        Raises:
            ValueError: if one was committed between two ranks' looks.
        """
        seen = {plan.storage_data for plan in plans}
        if len(seen) > 1:
            names = sorted(f"{step}@{epoch}" for step, epoch, _ in seen)
            raise ValueError(f"ranks found checkpoints {names}, expected one: give the step")
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan asks for; the checkpoint is leased until that is done.

        Raises:
            StorageRefusedError: if it is barred, or being collected, by now.
            ShardCorruptError: if a byte is not what was staged; what was filled is then worthless.
            StorageError: from the store.
        """
        store = opened(self._address)
        with _kept(store, self.manifest):
            self._give_back(store)
            wants = []
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    value = self._held.value(item.storage_index.fqn, self._rank)
                    planner.load_bytes(item, pickled(value))
                else:
                    wants += self._wanted(item, planner)
            read_ranges(store, wants)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _give_back(self, store: BlobStore) -> None:
        """Drop the lease of the time before the reading, which has one of its own."""
        lease, self._lease = self._lease, ""
        if lease:
            try:
                _leases(store).drop(lease)
            except StorageError as error:
                logger.warning("lease is not given back and ends by itself: %s (%s)", lease, error)

    def _wanted(self, item: ReadItem, planner: LoadPlanner) -> list[Want]:
        tensor = self._held.tensors[item.storage_index.fqn]
        offset = tuple(item.storage_index.offset or (0,) * len(tensor.shape))
        return _want(tensor.piece(offset, self._rank), item, planner)


def found(catalog: Catalog, step: int | None) -> Manifest:
    """Return the manifest of the checkpoint of a step, or of the newest that is of use.

    Newer ones that are barred or unreadable are passed over, and the log says why.

    Raises:
        BlobNotFoundError, StorageRefusedError, ManifestCorruptError: as `read_metadata`.
    """
    records = [record for record in catalog.commits() if not record.superseded]
    barred = catalog.barred()
    for record in records:
        where = (record.step, record.epoch)
        if step is None and (where in barred or record.manifest is None):
            why = reason_of(catalog.store, barred[where]) if where in barred else record.fault
            logger.warning("checkpoint %s@%s is passed over: %s", *where, why)
            continue
        if step not in (None, record.step):
            continue
        if where in barred:
            raise StorageRefusedError(
                f"checkpoint is barred, {reason_of(catalog.store, barred[where])}: step {step}"
            )
        if record.manifest is None:
            raise ManifestCorruptError(f"{record.fault}: step {step}")
        return record.manifest
    there = ", ".join(str(record.step) for record in records[:10]) or "none"
    asked = "any step" if step is None else f"step {step}"
    raise BlobNotFoundError(f"no checkpoint of {asked} can be loaded, there are: {there}")


def metadata_of(contents: Contents) -> Metadata:
    """Return what a checkpoint holds in torch's terms."""
    items: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        name: TensorStorageMetadata(
            properties=TensorProperties(dtype=DTYPES[tensor.dtype]),
            size=torch.Size(tensor.shape),
            chunks=[
                ChunkStorageMetadata(torch.Size(offset), torch.Size(pieces[0].chunk.shape))
                for offset, pieces in sorted(tensor.pieces.items())
            ],
        )
        for name, tensor in contents.tensors.items()
    }
    items |= {name: BytesStorageMetadata() for name in contents.values}
    return Metadata(items, planner_data=mapping_of(contents.paths, items))


class _Rows:
    """Takes rows of a piece and copies what is wanted of them to where it belongs."""

    def __init__(self, piece: Piece, item: ReadItem, planner: LoadPlanner, rows: int) -> None:
        self._item, self._planner = item, planner
        self._dtype = DTYPES[piece.chunk.dtype]
        self._shape = (rows, *piece.chunk.shape[1:]) if piece.chunk.shape else ()
        self._target = planner.resolve_tensor(item).detach()
        self._memory = _memory(self._target, self._dtype) if self._is_all() else None
        self._rows: memoryview | None = None

    def take(self, at: int, piece: memoryview) -> None:
        if self._rows is None:
            # Only now: until its turn comes it would only take room.
            size = int(np.prod(self._shape)) * self._dtype.itemsize
            self._rows = self._memory or np.empty(size, np.uint8).data
        self._rows[at : at + len(piece)] = piece

    def done(self) -> None:
        if self._memory is None:
            assert self._rows is not None
            rows = tensor_over(self._rows, self._dtype, self._shape)
            for dimension in range(1, len(self._shape)):
                start, length = self._item.storage_offsets[dimension], self._item.lengths[dimension]
                rows = rows.narrow(dimension, start, length)
            self._target.copy_(rows)
            self._rows = None
        self._planner.commit_tensor(self._item, self._target)

    def _is_all(self) -> bool:
        return tuple(self._item.lengths) == self._shape


def _want(piece: Piece, item: ReadItem, planner: LoadPlanner) -> list[Want]:
    """Return the rows of a piece that are wanted: none if the piece has no elements there."""
    chunk = piece.chunk
    first = item.storage_offsets[0] if chunk.shape else 0
    rows = item.lengths[0] if chunk.shape else 1
    landing = _Rows(piece, item, planner, rows)
    if not all(item.lengths):
        planner.commit_tensor(item, planner.resolve_tensor(item).detach())
        return []
    row = int(np.prod(chunk.shape[1:], dtype=np.int64)) * ITEM_BYTES[chunk.dtype]
    start = chunk.start + first * row
    return [Want(piece.index, start, start + rows * row, landing)]


def _memory(tensor: Tensor, dtype: torch.dtype) -> memoryview | None:
    """Return a tensor's own memory, if that is where bytes of this type can go as they are."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        return None
    if not tensor.numel():
        return None
    words: npt.NDArray[np.uint8] = tensor.view(-1).view(torch.uint8).numpy()
    return words.data


def _lease(store: BlobStore, manifest: Manifest) -> str:
    """Keep a checkpoint until its reading begins; return the lease, "" if none can be had."""
    try:
        lease = _leases(store).take(manifest.step, manifest.epoch, HOLDER, PLANNING_S)
    except (StorageRefusedError, StorageFullError):
        return ""  # whoever may only read can load all the same, if nobody collects
    _require_standing(store, manifest)
    return lease


@contextmanager
def _kept(store: BlobStore, manifest: Manifest) -> Iterator[None]:
    """Keep a checkpoint while it is read, if leases can be had."""
    with ExitStack() as stack:
        # As above.
        with suppress(StorageRefusedError, StorageFullError):
            stack.enter_context(
                _leases(store).kept(manifest.step, manifest.epoch, HOLDER, READING_S)
            )
        _require_standing(store, manifest)
        yield


def _leases(store: BlobStore) -> Leases:
    # Leases end by a clock that the machines of a run share, more or less.
    return Leases(store, time.time)  # noqa: TID251


def _require_standing(store: BlobStore, manifest: Manifest) -> None:
    standing = standing_of(store, manifest.step, manifest.epoch)
    if standing.barred:
        raise StorageRefusedError(
            f"checkpoint is barred, {reason_of(store, standing.barred)}: step {manifest.step}"
        )
