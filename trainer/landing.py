"""Has tensors hold what a checkpoint has of them; those of a device by way of the host's memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from storage import recut, shard
from storage.blob import BlobStore
from storage.contents import Contents, name_of
from trainer.staging import bytes_of

AT_ONCE_BYTES = 1 << 30
"""Of the host's memory, in which what is cut anew for a device is put together, a GiB at a time."""


def fill(tensor: Tensor, read: Callable[[memoryview], object]) -> None:
    """Have a tensor hold the bytes that are read."""
    arrived = _landing(tensor)
    read(bytes_of(arrived))
    _take_over(tensor, arrived)


def fill_some(
    store: BlobStore,
    held: Contents,
    todo: list[tuple[shard.Chunk, Tensor]],
    alive: Callable[[int], object],
) -> list[tuple[shard.Chunk, Tensor]]:
    """Fill the first of some tensors; return the others.

    Of a device's no more at a time than its host has room for beside all other ranks.
    """
    boxes, landed, landing = list[recut.Box](), list[tuple[Tensor, Tensor]](), 0
    for chunk, tensor in todo:
        landing += _room_on_host(tensor)
        if boxes and landing > AT_ONCE_BYTES:
            break
        arrived = _landing(tensor)
        landed.append((tensor, arrived))
        boxes.append(
            recut.Box(
                name=name_of(chunk),
                dtype=chunk.dtype,
                global_shape=chunk.global_shape,
                offset=chunk.offset,
                shape=chunk.shape,
                memory=bytes_of(arrived),
            )
        )
    recut.fill(store, held, boxes, alive)
    for tensor, arrived in landed:
        _take_over(tensor, arrived)
    return todo[len(boxes) :]


def _room_on_host(tensor: Tensor) -> int:
    """Return how many bytes of the host's memory a tensor takes while it is restored."""
    return 0 if tensor.device.type == "cpu" else tensor.nbytes


def _landing(tensor: Tensor) -> Tensor:
    """Return where the bytes of a tensor are read to: itself, or room on the host for a device's.

    Raises:
        ValueError: if its elements lie in the host's memory, and not one after the other.
    """
    if tensor.device.type != "cpu":
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if not tensor.is_contiguous():
        # What it would be read into is a copy of it, which nobody trains on.
        raise ValueError(
            f"strides are {tensor.stride()} in a tensor of shape {tuple(tensor.shape)} that is to "
            "be restored into, expected a contiguous one; have the model hold it as such"
        )
    return tensor


def _take_over(tensor: Tensor, arrived: Tensor) -> None:
    if arrived is not tensor:
        with torch.no_grad():  # which is each thread's own matter
            tensor.copy_(arrived)
