"""Says what a checkpoint holds, however it was cut: tensors by name, their pieces, other values.

A tensor's name here is what a state dict calls it. Shards that `storage.dcp` wrote have such names
as they are; a weight of the embedded trainer is `<state>.<fqn>`, as in `param.layers.0.wq.weight`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import msgspec

from storage import coverage, parallel
from storage.blob import BlobStore
from storage.commit import completed, fetch_index
from storage.errors import ShardCorruptError
from storage.manifest import Manifest, describe
from storage.shard import Chunk, Extra, ShardIndex, StagedChunk
from storage.typed import Json, from_json

STATE = "dcp"
"""What chunks are called whose `fqn` is the whole name. Further pieces of the same tensor in one
shard are of states `dcp.1`, `dcp.2` and so on."""
BESIDE = "dcp"
"""The entry of a shard's `extra` with the values beside the tensors, as the JSON of `Beside`."""
EXTRA = "extra"

Path: TypeAlias = tuple[str | int, ...]


class Beside(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a shard holds beside tensors.

    Attributes:
        values: by name, as `storage.typed` writes them.
        paths: where in the nested state dict a name stands, if it is not on top.
    """

    values: dict[str, Any] = {}
    paths: dict[str, list[str | int]] = {}


# As in storage/shard.py: made before there are threads.
_read = msgspec.json.Decoder(Beside).decode


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk and the index of the shard in which it lies."""

    index: ShardIndex
    chunk: StagedChunk


@dataclass(slots=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
        name: see above.
        dtype: safetensors' name for the item type.
        shape: of the whole.
        pieces: by offset, who has the box that begins there; of several, by shard. They differ only
            if ranks that did not confer wrote values of their own under one name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: dict[tuple[int, ...], list[Piece]] = field(default_factory=dict)

    def piece(self, offset: tuple[int, ...], prefer: int = 0) -> Piece:
        """Return the box at this offset, from a preferred shard if that has it, else the first.

        Raises:
            KeyError: if no box begins there.
        """
        held = self.pieces[offset]
        return next((piece for piece in held if piece.index.shard == prefer), held[0])


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        tensors: by name, ascending.
        values: by name and then by shard, as `storage.typed` writes them.
        paths: by name; a name that is not in here stands on top.
    """

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Mapping[int, Json]]
    paths: Mapping[str, Path]

    def value(self, name: str, prefer: int = 0) -> object:
        """Return a value beside the tensors, from a preferred shard if that has it, else the first.

        Raises:
            KeyError: if there is none of this name.
            ShardCorruptError: if it is of no known form.
        """
        held = self.values[name]
        return from_json(held[prefer if prefer in held else min(held)], name)


INDEXES_AT_ONCE = 256


def read_contents(
    store: BlobStore, manifest: Manifest, read: Callable[[int], object] = lambda _: None
) -> Contents:
    """Return what a committed checkpoint holds; reads all of its indexes and no body.

    Args:
        store: of the run.
        manifest: of the checkpoint.
        read: told now and then how many more indexes were read; may raise.

    Raises:
        BlobNotFoundError, ShardCorruptError, ForeignCheckpointError: as `fetch_index`; also if the
            shards contradict each other, or a tensor is not all there.
    """
    fetch = partial(fetch_index, store, completed(store, manifest))
    indexes: list[ShardIndex] = []
    for start in range(0, manifest.shards, INDEXES_AT_ONCE):
        some = range(start, min(start + INDEXES_AT_ONCE, manifest.shards))
        indexes += parallel.each(fetch, some)
        read(len(some))
    return contents_of(manifest, indexes)


def contents_of(manifest: Manifest, indexes: list[ShardIndex]) -> Contents:
    """Return what these shards hold together; see `read_contents`."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[int, Json]] = {}
    paths: dict[str, Path] = {}
    for index in indexes:
        for chunk in index.chunks:
            _add(tensors, index, chunk)
        beside = beside_of(index)
        for name, value in beside.values.items():
            values.setdefault(name, {})[index.shard] = value
        paths |= {name: tuple(path) for name, path in beside.paths.items()}
        paths |= _native_paths(index)
    for tensor in tensors.values():
        require_whole(tensor, describe(manifest))
    return Contents(manifest, dict(sorted(tensors.items())), dict(sorted(values.items())), paths)


def beside_of(index: ShardIndex) -> Beside:
    """Return what a shard holds beside tensors.

    Raises:
        ShardCorruptError: if it does not decode.
    """
    text = index.extra.get(BESIDE)
    if text is None:
        # Of another writer, such as the embedded trainer: its cursor. All shards have the same.
        held = {f"{EXTRA}.{key}": _plain(value) for key, value in index.extra.items()}
        return Beside(values=held, paths={name: [EXTRA, name[len(EXTRA) + 1 :]] for name in held})
    try:
        return _read(str(text))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ShardCorruptError(f"values beside the tensors do not decode: {error}") from error


def extra_of(beside: Beside) -> Extra:
    """Return the `extra` of a shard that holds this beside its tensors."""
    return {BESIDE: msgspec.json.encode(beside).decode()}


def name_of(chunk: Chunk) -> str:
    """Return the name of the tensor that a chunk is a piece of."""
    return chunk.fqn if _is_whole_name(chunk) else f"{chunk.state}.{chunk.fqn}"


def require_whole(tensor: Tensor, where: str) -> None:
    """Check that the boxes of a tensor have each of its elements once.

    Raises:
        ShardCorruptError: if some are missing. They would silently stay what they were.
    """
    held = sum(math.prod(pieces[0].chunk.shape) for pieces in tensor.pieces.values())
    if held < math.prod(tensor.shape):
        raise ShardCorruptError(
            f"{held} of {math.prod(tensor.shape)} elements are there: {tensor.name} of {where}"
        )
    boxes = ((offset, pieces[0].chunk.shape) for offset, pieces in tensor.pieces.items())
    if not coverage.whole(tensor.shape, boxes):
        raise ShardCorruptError(f"boxes overlap, or leave a gap: {tensor.name} of {where}")


def _plain(value: object) -> Json:
    return list(value) if isinstance(value, list) else value  # type: ignore[return-value]  # Scalar


def _is_whole_name(chunk: Chunk) -> bool:
    return chunk.state == STATE or chunk.state.startswith(f"{STATE}.")


def _native_paths(index: ShardIndex) -> dict[str, Path]:
    return {name_of(c): (c.state, c.fqn) for c in index.chunks if not _is_whole_name(c)}


def _add(tensors: dict[str, Tensor], index: ShardIndex, chunk: StagedChunk) -> None:
    name = name_of(chunk)
    tensor = tensors.setdefault(name, Tensor(name, chunk.dtype, chunk.global_shape))
    found, expected = (chunk.dtype, chunk.global_shape), (tensor.dtype, tensor.shape)
    if found == expected and 0 in chunk.shape and 0 not in chunk.global_shape:
        # A rank for which no rows were left: that begins where the next one's may.
        return
    same = tensor.pieces.setdefault(chunk.offset, [])
    if found != expected or (same and same[0].chunk.shape != chunk.shape):
        raise ShardCorruptError(
            f"{name} is {chunk.dtype} {chunk.shape} of {chunk.global_shape}, another shard says "
            f"{tensor.dtype} of {tensor.shape}, in the same place: shard {index.shard}"
        )
    same.append(Piece(index, chunk))
