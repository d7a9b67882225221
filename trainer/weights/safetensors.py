"""Reads and writes the safetensors format: a length, a table in JSON, and the tensors' bytes.

Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from typing import Annotated, BinaryIO, NamedTuple

import msgspec
import torch
from torch import Tensor

from orchestrator.worker import MisconfiguredError
from trainer.weights.files import Folder, decoded
from trainer.weights.names import Shape
from trainer.weights.spans import DAMAGED, Span, bytes_of
from trainer.weights.stored import DTYPES

TABLE_BYTES_MAX = 100_000_000
"""Of the format."""
_LENGTH = struct.Struct("<Q")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=8)]
    data_offsets: tuple[_Count, _Count]


def read_table(folder: Folder, file: str) -> dict[str, Span]:
    """Return where every tensor of a file lies, by name.

    Raises:
        MisconfiguredError: if it is no such file, is cut short, or has items of an unknown type.
    """
    where, size = folder.where(file), folder.size(file)
    head = bytearray(min(_LENGTH.size, size))
    folder.fill(file, 0, memoryview(head))
    length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
    if not 2 <= length <= min(TABLE_BYTES_MAX, size - _LENGTH.size):
        raise MisconfiguredError(
            f"table of {length} bytes in a file of {size}, expected 2 to "
            f"{min(TABLE_BYTES_MAX, max(size - _LENGTH.size, 0))}: {where}",
            hint=f"{DAMAGED}; or it is no safetensors file",
        )
    content = bytearray(length)
    folder.fill(file, _LENGTH.size, memoryview(content))
    raw = decoded(bytes(content), dict[str, msgspec.Raw], where)
    entries = {
        name: decoded(bytes(entry), _Entry, f"{name}: {where}")
        for name, entry in raw.items()
        if name != "__metadata__"
    }
    _require_sound(entries, size - _LENGTH.size - length, where)
    return {
        name: Span(
            folder=folder,
            file=file,
            start=_LENGTH.size + length + entry.data_offsets[0],
            shape=entry.shape,
            dtype=DTYPES[entry.dtype],
        )
        for name, entry in entries.items()
    }


def _require_sound(entries: dict[str, _Entry], data_bytes: int, where: str) -> None:
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in DTYPES:
            raise MisconfiguredError(
                f"dtype is {entry.dtype!r}, expected one of {', '.join(DTYPES)}: {name}: {where}",
                hint="quantised weights can not be trained: take the release in bfloat16",
            )
        begin, end = entry.data_offsets
        size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if begin != at or end - begin != size:
            raise MisconfiguredError(
                f"bytes {begin} to {end}, expected {at} to {at + size}: {name}: {where}",
                hint=DAMAGED,
            )
        at = end
    if at != data_bytes:
        raise MisconfiguredError(
            f"{data_bytes} bytes of tensors, its table says {at}: {where}", hint=DAMAGED
        )


class Planned(NamedTuple):
    """A tensor that is to be written: made when its turn comes, and then forgotten."""

    name: str
    shape: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Contiguous, of that shape and type."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(file: BinaryIO, tensors: Iterable[Planned]) -> None:
    """Write a file of these tensors, holding one at a time."""
    planned = list(tensors)
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in planned:
        table[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (at, at + tensor.nbytes),
        }
        at += tensor.nbytes
    encoded = msgspec.json.encode(table)
    # The tensors begin at a multiple of 8, as the format asks.
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
    file.write(_LENGTH.pack(len(encoded)) + encoded)
    for tensor in planned:
        file.write(bytes_of(tensor.make()))
