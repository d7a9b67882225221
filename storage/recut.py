"""Fills boxes of tensors from a committed checkpoint, however that was cut.

A rank of another layout has boxes that are parts of several stored ones. Of each stored box that
one overlaps, the rows that they have in common are read, by blocks that are verified.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.blob import BlobStore
from storage.contents import Contents, Piece
from storage.errors import ForeignCheckpointError
from storage.manifest import describe
from storage.ranges import Want, read_ranges
from storage.shard import ITEM_BYTES

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """What is wanted: `shape` items from `offset` of a tensor of `global_shape`.

    Attributes:
        name: of the tensor, as in `storage.contents`.
        dtype: safetensors' name for the item type.
        memory: where to, flat and writable: the items, row after row.
    """

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    memory: memoryview


def fill(
    store: BlobStore,
    contents: Contents,
    boxes: Sequence[Box],
    read: Callable[[int], object] = lambda _: None,
) -> None:
    """Fill boxes from a checkpoint; of every byte that is read its block was verified.

    Args:
        store: of the run.
        contents: of the checkpoint; `read_contents` sees to it that no element is missing there.
        boxes: in any order.
        read: told the bytes of each block that was read and verified.

    Raises:
        ForeignCheckpointError: if a tensor is not there, or is another one; nothing was filled.
        BlobNotFoundError: if a body is not there.
        ShardCorruptError: if a byte is not what was staged; what was filled is then worthless.
    """
    read_ranges(store, [want for box in boxes for want in _wants(contents, box)], read)


def _wants(contents: Contents, box: Box) -> Iterator[Want]:
    """Yield the rows of stored boxes that a box is to be made of."""
    tensor = contents.tensors.get(box.name)
    found = None if tensor is None else (tensor.dtype, tensor.shape)
    if tensor is None or found != (box.dtype, box.global_shape):
        there = "not there" if found is None else f"{found[0]} of shape {list(found[1])}"
        raise ForeignCheckpointError(
            f"{box.name} is {there}, expected {box.dtype} of shape {list(box.global_shape)}: "
            f"{describe(contents.manifest)}"
        )
    if 0 not in box.shape:
        parts = (_Part.of(box, pieces[0]) for pieces in tensor.pieces.values())
        yield from (part.want() for part in parts if part is not None)


class _Part:
    """What a box and a stored one have in common; takes the rows of that one in which it lies."""

    def __init__(
        self, box: Box, piece: Piece, starts: tuple[int, ...], shape: tuple[int, ...]
    ) -> None:
        self._box, self._piece = box, piece
        self.starts, self.shape = starts, shape
        """In the whole tensor."""
        chunk = piece.chunk
        self._row = math.prod(chunk.shape[1:]) * ITEM_BYTES[chunk.dtype]
        # Whole rows of both go to where they belong as they are.
        self._whole = chunk.shape[1:] == box.shape[1:] == shape[1:]
        self._rows = self._place() if self._whole else None

    @classmethod
    def of(cls, box: Box, piece: Piece) -> "_Part | None":
        """Return what they have in common; None if that is nothing."""
        chunk = piece.chunk
        starts = tuple(map(max, box.offset, chunk.offset))
        box_ends = map(sum, zip(box.offset, box.shape, strict=True))
        chunk_ends = map(sum, zip(chunk.offset, chunk.shape, strict=True))
        ends = tuple(map(min, box_ends, chunk_ends))
        shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return cls(box, piece, starts, shape) if all(size > 0 for size in shape) else None

    def want(self) -> Want:
        """Return which bytes of the body those rows are."""
        chunk = self._piece.chunk
        first = self.starts[0] - chunk.offset[0] if chunk.shape else 0
        start = chunk.start + first * self._row
        return Want(self._piece.index, start, start + self._size, self)

    @property
    def _size(self) -> int:
        return (self.shape[0] if self.shape else 1) * self._row

    def take(self, at: int, piece: memoryview) -> None:
        """Take bytes of the rows."""
        if self._rows is None:
            # Only now: until its turn comes it would only take room.
            self._rows = memoryview(bytearray(self._size))
        self._rows[at : at + len(piece)] = piece

    def done(self) -> None:
        """Copy what is wanted of the rows to where it belongs, unless it is there."""
        rows, self._rows = self._rows, None
        if self._whole:
            return
        assert rows is not None
        chunk, box = self._piece.chunk, self._box
        words = _WORDS[ITEM_BYTES[chunk.dtype]]
        stored = np.frombuffer(rows, words).reshape(self.shape[0], *chunk.shape[1:])
        inner = _within(self.starts, self.shape, (self.starts[0], *chunk.offset[1:]))
        target: npt.NDArray[np.unsignedinteger] = np.frombuffer(box.memory, words)
        target.reshape(box.shape)[_within(self.starts, self.shape, box.offset)] = stored[inner]

    def _place(self) -> memoryview:
        """Return the memory of its rows in the box."""
        first = self.starts[0] - self._box.offset[0] if self.shape else 0
        return self._box.memory[first * self._row : first * self._row + self._size]


def _within(
    starts: tuple[int, ...], shape: tuple[int, ...], offset: tuple[int, ...]
) -> tuple[slice, ...]:
    """Return where a part lies in a box that begins at `offset`."""
    return tuple(
        slice(start - at, start - at + size)
        for start, size, at in zip(starts, shape, offset, strict=True)
    )
