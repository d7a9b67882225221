"""Writes a checkpoint for `torch.distributed.checkpoint.save` and `async_save`.

Each rank makes a shard of its own, and the coordinator commits once all of them are in the store:
it hears of them through torch's collective or, without, sees them in a listing.
"""

import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter as TorchStorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from storage import coverage, parallel
from storage.blob import BlobStore, get_small
from storage.commit import commit, write_shard
from storage.contents import Beside, contents_of, extra_of
from storage.dcp.items import DTYPES, chunk_of, paths_of, tensor_over, value_of
from storage.dcp.target import Address, claimed_epoch, names_step, opened, step_of
from storage.digest import sha256_hex
from storage.errors import ForeignCheckpointError, StorageUnavailableError, UnstorableError
from storage.manifest import (
    ShardReceipt,
    generation_prefix,
    index_key,
    make_manifest,
    receipt_of,
)
from storage.paged import paged
from storage.shard import (
    INDEX_BYTES_MAX,
    Chunk,
    ShardIndex,
    ShardMeta,
    ShardPlan,
    decode_index,
    describe,
    seal,
)
from storage.shard import (
    plan as laid_out,
)

POLL_S = 0.2
COMMIT_TIMEOUT_S = 1800.0


class Place(NamedTuple):
    """What the coordinator tells each rank with its plan: number of shards, and the epoch."""

    shards: int
    epoch: int


class StorageWriter(TorchStorageWriter):
    """Writes each rank's items as a shard, and commits.

    The step is the number in torch's `checkpoint_id`, or the one given here. A step that this epoch
    has saved can not be saved again with other content, nor can an earlier one; after going back,
    take a new epoch.

    Args:
        address: of the store, which belongs to one run.
        step: if `checkpoint_id` is not used.
        epoch: the fencing token: a commit is refused once a newer epoch has committed. Needed with
            `use_collectives=False`, and the same on all ranks; see `agree_epoch`. Without it the
            coordinator takes one above every other in the store, once in the life of its process.
        run_id: name of the run, for people.
        model: fingerprint of the architecture, if there is one.
        ranks: how many save, with `use_collectives=False`; those of the default group if not given.
        commit_timeout_s: without collectives, how long the coordinator waits for the other ranks'
            shards.
    """

    def __init__(
        self,
        address: Address,
        *,
        step: int | None = None,
        epoch: int | None = None,
        run_id: str = "dcp",
        model: str = "",
        ranks: int | None = None,
        commit_timeout_s: float = COMMIT_TIMEOUT_S,
    ) -> None:
        self._address, self._step, self._epoch = address, step, epoch
        self._run_id, self._model = run_id, model
        self._ranks, self._timeout_s = ranks, commit_timeout_s
        self._rank, self._is_coordinator, self._confers = 0, True, True
        self._place: Place | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin with a checkpoint; see `target.step_of` for what the id means."""
        self._place = None
        if checkpoint_id is not None:
            self._step = step_of(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether an id has a step in it."""
        return names_step(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **kwargs: Any) -> None:  # noqa: ANN401, FBT001 - torch's signature
        """Take up the rank's part.

        Raises:
            ValueError: if it is not said which step this is, or, without collectives, which epoch.
        """
        self._is_coordinator = is_coordinator
        self._rank = int(kwargs.get("rank", 0))
        self._confers = bool(kwargs.get("use_collectives", True))
        if self._step is None:
            raise ValueError("step is not given, expected it as checkpoint_id or as step=")
        if not self._confers and self._epoch is None:
            raise ValueError(
                "epoch is not given, expected one that all ranks have with use_collectives=False, "
                "from agree_epoch"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank the number of shards and the epoch; see `Place`."""
        epoch = claimed_epoch(self._address) if self._epoch is None else self._epoch
        self._place = Place(len(plans) if self._confers else self._world(), epoch)
        # Plain numbers: they go through torch's own messages.
        told = tuple(self._place)
        return [dataclasses.replace(plan, storage_data=told) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Make this rank's shard durable; the answer is one result with its receipt.

        Raises:
            UnstorableError: if an item can not be stored.
            StorageError: from the store.
        """
        index, body = self._staged(plan, planner, self._told(plan))
        receipt = write_shard(opened(self._address), index, body)
        size = sum(chunk.size for chunk in index.chunks)
        result = WriteResult(
            MetadataIndex(f"shard {receipt.shard}"),
            size,
            (receipt.shard, receipt.size, receipt.index_digest),
        )
        future: Future[list[WriteResult]] = Future()
        future.set_result([result])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the checkpoint; without collectives, only the coordinator does, when all is there.

        Raises:
            UnstorableError: if the plan leaves a part of a tensor out.
            StorageUnavailableError: if shards are missing after the time for it.
            ForeignCheckpointError: if one is of another run, model or number of ranks.
            StaleEpochError: if a newer epoch has committed, or a later step of this one.
            StorageError: from the store.
        """
        if not self._is_coordinator:
            return
        store = opened(self._address)
        if self._confers:
            _require_whole(metadata)
            receipts = [
                ShardReceipt(shard=shard, size=size, index_digest=digest)
                for told in results
                for shard, size, digest in (result.storage_data for result in told)
            ]
            self._commit(store, receipts)
        else:
            indexes = self._awaited(store)
            self._require_ours([index for index, _ in indexes])
            digests = [receipt_of(index, digest) for index, digest in indexes]
            self._commit(store, digests, [index for index, _ in indexes])

    def _told(self, plan: SavePlan) -> Place:
        """Return the number of shards and the epoch.

        A planner that caches plans hands out an old one, with what it said then: the epoch of this
        process in the store, which it still is, unless a later one was given.
        """
        if self._place is not None:
            return self._place
        shards, epoch = plan.storage_data
        return Place(shards, epoch if self._epoch is None else self._epoch)

    def _staged(
        self, plan: SavePlan, planner: SavePlanner, place: Place
    ) -> tuple[ShardIndex, memoryview]:
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        chunks = list(_chunks(tensors))
        layout = laid_out(chunks)
        body = paged(layout.size)
        _copy(layout, body, zip(chunks, tensors, strict=True), planner)
        values = {
            item.index.fqn: value_of(planner.resolve_data(item), item.index.fqn)
            for item in plan.items
            if item.type == WriteItemType.BYTE_IO
        }
        names = dict.fromkeys(item.index.fqn for item in plan.items)
        beside = Beside(values=values, paths=paths_of(plan.planner_data, names))
        assert self._step is not None
        meta = ShardMeta(
            run_id=self._run_id,
            model=self._model,
            step=self._step,
            epoch=place.epoch,
            shard=self._rank,
            shards=place.shards,
            extra=extra_of(beside),
        )
        return seal(layout, body, meta), body

    def _commit(
        self,
        store: BlobStore,
        receipts: list[ShardReceipt],
        indexes: list[ShardIndex] | None = None,
    ) -> None:
        assert self._place is not None
        assert self._step is not None
        manifest = make_manifest(
            receipts,
            run_id=self._run_id,
            model=self._model,
            step=self._step,
            epoch=self._place.epoch,
            layout={"by": "dcp", "ranks": self._place.shards},
        )
        if indexes is not None:
            contents_of(manifest, indexes)  # nobody else has looked whether all of it is there
        commit(store, manifest, newest_epoch_known=self._place.epoch)

    def _awaited(self, store: BlobStore) -> list[tuple[ShardIndex, str]]:
        """Wait for the shards of all ranks; return their indexes and the digests of these."""
        assert self._place is not None
        assert self._step is not None
        where = (self._step, self._place.epoch)
        wanted = {index_key(*where, shard) for shard in range(self._place.shards)}
        until = time.monotonic() + self._timeout_s
        while missing := wanted.difference(store.keys(generation_prefix(*where))):
            if time.monotonic() > until:
                raise StorageUnavailableError(
                    f"{len(missing)} of {len(wanted)} shards are missing after "
                    f"{self._timeout_s:g} s, the checkpoint is not committed: {min(missing)}"
                )
            time.sleep(POLL_S)
        return parallel.each(partial(_index, store, *where), range(self._place.shards))

    def _require_ours(self, indexes: list[ShardIndex]) -> None:
        """Check that none is left from another life of the run that took the same epoch."""
        assert self._place is not None
        for shard, index in enumerate(indexes):
            found = (index.run_id, index.model, index.step, index.epoch, index.shard, index.shards)
            expected = (self._run_id, self._model, self._step, self._place.epoch)
            if found != (*expected, shard, self._place.shards):
                raise ForeignCheckpointError(
                    f"{describe(index)} is of run {index.run_id!r:.80}, model {index.model!r:.80}, "
                    f"one of {index.shards}; expected shard {shard} of {self._place.shards} of run "
                    f"{self._run_id!r:.80}, model {self._model!r:.80}, step {self._step}"
                )

    def _world(self) -> int:
        if self._ranks is not None:
            return self._ranks
        return dist.get_world_size() if dist.is_initialized() else 1


def _chunks(items: Iterable[WriteItem]) -> Iterator[Chunk]:
    pieces: Counter[str] = Counter()
    for item in items:
        yield chunk_of(item, pieces[item.index.fqn])
        pieces[item.index.fqn] += 1


def _copy(
    layout: ShardPlan,
    body: memoryview,
    items: Iterable[tuple[Chunk, WriteItem]],
    planner: SavePlanner,
) -> None:
    views = layout.views(body)
    for chunk, item in items:
        tensor = planner.resolve_data(item)
        expected = (DTYPES[chunk.dtype], chunk.shape)
        if not isinstance(tensor, Tensor) or (tensor.dtype, tuple(tensor.shape)) != expected:
            raise UnstorableError(
                f"planner made {_words(tensor)}, its plan says {expected[0]} of shape "
                f"{expected[1]}: {chunk.fqn}"
            )
        tensor_over(views[chunk.name], *expected).copy_(tensor.detach())


def _words(thing: object) -> str:
    if isinstance(thing, Tensor):
        return f"{thing.dtype} of shape {tuple(thing.shape)}"
    return f"a {type(thing).__name__}"


def _require_whole(metadata: Metadata) -> None:
    for name, one in metadata.state_dict_metadata.items():
        if not isinstance(one, TensorStorageMetadata):
            continue
        boxes = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in one.chunks}
        held = sum(math.prod(size) for _, size in boxes)
        if held < math.prod(one.size):
            raise UnstorableError(
                f"plan has {held} of {math.prod(one.size)} elements, expected all: {name}"
            )
        if not coverage.whole(tuple(one.size), boxes):
            raise UnstorableError(f"plan has boxes that overlap, expected each once: {name}")


def _index(store: BlobStore, step: int, epoch: int, shard: int) -> tuple[ShardIndex, str]:
    data = get_small(store, index_key(step, epoch, shard), INDEX_BYTES_MAX)
    return decode_index(data), sha256_hex(data)
