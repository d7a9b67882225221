"""Saves what several ranks have through `storage.dcp`, one after the other, in this process."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from storage import dcp
from storage.blob import BlobStore

VARIED: dict[str, Any] = {
    "model": {
        "w": torch.arange(35.0).reshape(7, 5),
        "half": torch.arange(6).to(torch.bfloat16).reshape(2, 3),
        "f8": torch.arange(4.0).to(torch.float8_e5m2),
        "mask": torch.tensor([True, False, True]),
        "none": torch.empty(0, 3),
    },
    "optim": {"groups": [{"lr": 0.1, "betas": (0.9, 0.95)}], "seen": OrderedDict(a=b"\xff")},
}
"""A value of every kind that there is."""


def emptied(value: Any) -> Any:
    """Return a state of the same form that has nothing of the other one yet."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: emptied(item) for key, item in value.items()}
    return [emptied(item) for item in value] if isinstance(value, list) else "?"


class RowsPlanner(DefaultSavePlanner):
    """Has each rank save some rows of the tensors, and the first rank all other values."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [
            self._cut(item) if item.type == WriteItemType.TENSOR else item
            for item in plan.items
            if item.type == WriteItemType.TENSOR or self.rank == 0
        ]
        return SavePlan(items, planner_data=plan.planner_data)

    def resolve_data(self, write_item: WriteItem) -> Any:
        found = super().resolve_data(
            WriteItem(MetadataIndex(write_item.index.fqn), WriteItemType.TENSOR)
            if write_item.type == WriteItemType.SHARD
            else write_item
        )
        if write_item.type == WriteItemType.SHARD:
            assert isinstance(found, Tensor)
            return self._rows(found)
        return found

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.tensor_split(self.ranks)[self.rank]

    def _cut(self, item: WriteItem) -> WriteItem:
        data = item.tensor_data
        assert data is not None
        whole = torch.arange(data.size[0]).tensor_split(self.ranks)
        offset = [sum(len(rows) for rows in whole[: self.rank]), *[0] * (len(data.size) - 1)]
        sizes = [len(whole[self.rank]), *data.size[1:]]
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes))
        properties = TensorProperties(dtype=data.properties.dtype)
        return WriteItem(
            MetadataIndex(item.index.fqn, offset),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, data.size),
        )


def saved(
    store: BlobStore,
    state: dict[str, Any],
    step: int,
    *,
    epoch: int = 1,
    ranks: int = 2,
    before: Callable[[int], object] = lambda _rank: None,
    timeout_s: float = 0.0,
) -> None:
    """Save rows of a state from each rank, without collectives; the coordinator is the last."""
    for rank in reversed(range(ranks)):
        before(rank)
        writer = dcp.StorageWriter(
            store, step=step, epoch=epoch, ranks=ranks, commit_timeout_s=timeout_s
        )
        planner = RowsPlanner(rank, ranks)
        planner.set_up_planner(state, is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=False)
        local = writer.prepare_local_plan(planner.create_local_plan())
        plans, metadata = planner.create_global_plan([local])
        (plan,) = writer.prepare_global_plan(plans)
        written = writer.write_data(planner.finish_plan(plan), planner)
        writer.finish(metadata, [written.wait()])
