"""Brings tensors from elsewhere into a store, as a checkpoint, and takes them out as safetensors.

What is taken out lies in a folder that has its name only once all of it is there and synced. What
is brought in is a checkpoint with one commit record, like any other.
"""

import errno
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from storage import coverage
from storage.appearing import appearing
from storage.blob import BlobStore
from storage.claim import Claimed
from storage.commit import newest_epoch, write_shard
from storage.contents import STATE, Beside, Contents, Piece, Tensor, extra_of
from storage.errors import ForeignFormatError, StorageFullError, UnstorableError
from storage.manifest import Manifest, ShardReceipt, make_manifest
from storage.paged import paged
from storage.ranges import Want, read_ranges
from storage.shard import (
    DIMENSIONS_MAX,
    ITEM_BYTES,
    Chunk,
    Extra,
    ShardMeta,
    ShardPlan,
    plan,
    seal,
)

SHARD_BYTES = 1 << 30
FILE_BYTES = 5 << 30
INDEX = "model.safetensors.index.json"
HEADER_BYTES_MAX = 100_000_000
"""More, the library does not read either."""
INDEX_BYTES_MAX = 1 << 30
METADATA = "__metadata__"
"""In the header of a file, what is no tensor."""
_OF_SET = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_OF_RANK = re.compile(r"shard-\d+-.*")
_PLACES = "DCP_SHARDING_INFO"
"""Where torch says in such a file in which place of the whole each of its tensors lies."""

Box: TypeAlias = tuple[int, ...]
Told = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a tensor that is brought in.

    Attributes:
        name: of the tensor in the state dict.
        dtype: safetensors' name.
        offset: of the piece in the whole.
        fill: writes the bytes of the piece to where it is told.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    fill: Callable[[memoryview], None]

    @property
    def size(self) -> int:
        """Bytes of the piece."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def chunk(self, number: int) -> Chunk:
        """Return what it is in a shard, as the piece of this number of its tensor there."""
        state = f"{STATE}.{number}" if number else STATE
        boxes = {"shape": self.shape, "global_shape": self.global_shape, "offset": self.offset}
        return Chunk(fqn=self.name, state=state, dtype=self.dtype, **boxes)


def export_safetensors(
    store: BlobStore,
    contents: Contents,
    out: Path,
    *,
    file_bytes: int = FILE_BYTES,
    read: Told = lambda _: None,
) -> int:
    """Write the whole tensors of a checkpoint to a new folder; return the number of files.

    Values beside the tensors go into the index, under `metadata.holdfast`.

    Args:
        store: of the checkpoint.
        contents: of the checkpoint.
        out: the folder.
        file_bytes: of one file; only a tensor that has more makes a larger one.
        read: told the bytes as they are read.

    Raises:
        FileExistsError: if there is something of that name.
        UnstorableError: if a tensor has a name that no such file can have.
        ShardCorruptError: if a byte is not what was staged; nothing is there then.
        StorageFullError: if there is no room; nothing is there then.
        OSError: from the file system.
    """
    if METADATA in contents.tensors:
        error = UnstorableError(f"safetensors keep this name for themselves: {METADATA}")
        error.hint = "Export it with --format dcp."
        raise error
    groups = list(_grouped(list(contents.tensors.values()), _size, file_bytes)) or [[]]
    where: dict[str, str] = {}
    with appearing(out) as folder:
        for number, tensors in enumerate(groups, 1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            _write_file(store, folder / name, tensors, read)
            where |= {tensor.name: name for tensor in tensors}
        size = sum(map(_size, contents.tensors.values()))
        index = {
            "metadata": {"total_size": size, "holdfast": _beside(contents)},
            "weight_map": dict(sorted(where.items())),
        }
        with (folder / INDEX).open("xb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(index), indent=2))
            os.fsync(file.fileno())
    return len(groups)


def parts_of_safetensors(folder: Path) -> tuple[list[Part], Beside]:
    """Return what a set of safetensors files holds; reads headers and an index, if there is one.

    Raises:
        ForeignFormatError: if a file is cut off, contradicts itself, or is missing.
        UnstorableError: if a file has no whole tensors, but what one rank held of them.
        OSError: if it can not be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    _require_all(files)
    parts = [part for path in files for part in _parts(path)]
    names = Counter(part.name for part in parts)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ForeignFormatError(f"tensor is in two files: {twice[0]!r:.200} of {folder}")
    beside = Beside()
    for path in sorted(folder.glob("*.safetensors.index.json")):
        with path.open("rb") as file:
            index = _decoded(file.read(INDEX_BYTES_MAX), _Index, path)
        if missing := sorted(index.weight_map.keys() - names.keys()):
            raise ForeignFormatError(f"index has tensors that no file has: {missing[0]!r:.200}")
        beside = index.metadata.holdfast or beside
    return parts, beside


def bring_in(  # noqa: PLR0913 - what is asked for, and the two who are told
    store: BlobStore,
    parts: Sequence[Part],
    beside: Beside,
    *,
    step: int,
    run_id: str,
    shard_bytes: int = SHARD_BYTES,
    read: Told = lambda _: None,
    left: Callable[[str], object] = lambda _: None,
) -> Manifest:
    """Write parts of tensors as a checkpoint, in an epoch of its own, and commit it.

    Takes the memory of one shard. What was written is taken back if it is broken off.

    Args:
        store: in which it is to be.
        parts: all of them.
        beside: what is not tensors.
        step: of the checkpoint.
        run_id: name of the run.
        shard_bytes: of one body; only a part that has more makes a larger one.
        read: told the bytes as they are read.
        left: told what could not be taken back.

    Raises:
        StorageError: from the store; nothing is committed then, unless it is one of which
            the outcome is not known, which `left` is told.
        StaleEpochError: if somebody else writes this epoch.
        ForeignFormatError: from a part; also if the parts are not all of a tensor, each element
            once, or no part of it. Nothing is written in these two cases.
    """
    _require_whole(parts)
    epoch = newest_epoch(store) + 1
    groups = list(_grouped(parts, lambda part: part.size, shard_bytes)) or [[]]
    layouts = [_planned(group) for group in groups]  # all of them before anything is written
    _require_once(parts)
    claimed = Claimed(store, step, epoch)

    def write() -> list[ShardReceipt]:
        receipts = []
        for shard, (group, layout) in enumerate(zip(groups, layouts, strict=True)):
            meta = ShardMeta(
                run_id=run_id,
                model="",
                step=step,
                epoch=epoch,
                shard=shard,
                shards=len(groups),
                extra=extra_of(beside if shard == 0 else Beside()),
            )
            receipts.append(_bring_in(claimed, group, layout, meta, read))
        return receipts

    receipts = claimed.unless_written(write, left)
    made: Extra = {"by": "import", "shards": len(groups)}
    manifest = make_manifest(receipts, run_id=run_id, model="", step=step, epoch=epoch, layout=made)
    claimed.commit(manifest, left)
    return manifest


def _require_whole(parts: Iterable[Part]) -> None:
    held: Counter[str] = Counter()
    wholes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part in parts:
        if len(part.shape) > DIMENSIONS_MAX or len(part.global_shape) > DIMENSIONS_MAX:
            raise ForeignFormatError(f"more than {DIMENSIONS_MAX} dimensions: {part.name:.200}")
        whole = (part.dtype, part.global_shape)
        if wholes.setdefault(part.name, whole) != whole:
            raise ForeignFormatError(f"pieces are of different tensors: {part.name:.200}")
        held[part.name] += math.prod(part.shape)
    for name, (_, shape) in wholes.items():
        if held[name] != math.prod(shape):
            raise ForeignFormatError(
                f"{held[name]} of {math.prod(shape)} elements are there: {name:.200}"
            )


def _require_once(parts: Iterable[Part]) -> None:
    """Check parts, each of which is inside its tensor, for some that overlap."""
    boxes: dict[str, list[tuple[Box, Box]]] = {}
    shapes: dict[str, Box] = {}
    for part in parts:
        boxes.setdefault(part.name, []).append((part.offset, part.shape))
        shapes[part.name] = part.global_shape
    for name, shape in shapes.items():
        if not coverage.whole(shape, boxes[name]):
            raise ForeignFormatError(f"boxes overlap, or leave a gap: {name:.200}")


def _chunks(parts: Iterable[Part]) -> Iterator[Chunk]:
    pieces: Counter[str] = Counter()
    for part in parts:
        yield part.chunk(pieces[part.name])
        pieces[part.name] += 1


def _planned(parts: Sequence[Part]) -> ShardPlan:
    try:
        return plan(_chunks(parts))
    except ValueError as error:
        raise ForeignFormatError(f"tensors do not go into a shard: {error}") from error


def _bring_in(
    store: BlobStore, parts: Sequence[Part], layout: ShardPlan, meta: ShardMeta, read: Told
) -> ShardReceipt:
    body = paged(layout.size)
    views = layout.views(body)
    for chunk, part in zip(_chunks(parts), parts, strict=True):
        part.fill(views[chunk.name])
        read(part.size)
    return write_shard(store, seal(layout, body, meta), body)


def _grouped(items: Sequence[Any], size_of: Callable[[Any], int], most: int) -> Iterator[list[Any]]:
    """Yield the items in their order, in groups of no more than so many bytes if that can be."""
    group: list[Any] = []
    size = 0
    for item in items:
        if group and size + size_of(item) > most:
            yield group
            group, size = [], 0
        group.append(item)
        size += size_of(item)
    if group:
        yield group


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def _beside(contents: Contents) -> Beside:
    values = {name: held[min(held)] for name, held in contents.values.items()}
    return Beside(values=values, paths={name: list(path) for name, path in contents.paths.items()})


# Files of safetensors -----------------------------------------------------------------------------


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Placing(msgspec.Struct):
    saved_offsets: tuple[int, ...]


class _Metadata(msgspec.Struct):
    holdfast: Beside | None = None


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)


class _Placed:
    """Puts a piece of a tensor to its place in the whole."""

    def __init__(self, piece: Piece, whole: npt.NDArray[Any]) -> None:
        chunk = piece.chunk
        ends = (at + size for at, size in zip(chunk.offset, chunk.shape, strict=True))
        where = tuple(slice(at, end) for at, end in zip(chunk.offset, ends, strict=True))
        self._target, self._size = whole[where], chunk.size
        self._bytes: memoryview | None = None

    def take(self, at: int, piece: memoryview) -> None:
        if self._bytes is None:
            # Only now: until its turn comes it would only take room.
            self._bytes = np.empty(self._size, np.uint8).data
        self._bytes[at : at + len(piece)] = piece

    def done(self) -> None:
        assert self._bytes is not None
        words = np.frombuffer(self._bytes, self._target.dtype)
        self._target[...] = words.reshape(self._target.shape)
        self._bytes = None


def _write_file(store: BlobStore, path: Path, tensors: Sequence[Tensor], read: Told) -> None:
    # Largest items first keeps every tensor aligned: there may be no gaps.
    ordered = sorted(tensors, key=lambda one: (-ITEM_BYTES[one.dtype], one.name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, at = [], 0
    for tensor in ordered:
        starts.append(at)
        at += _size(tensor)
        table[tensor.name] = _Entry(tensor.dtype, tensor.shape, (starts[-1], at))
    header = msgspec.json.encode(table)
    header = header.ljust(-(-(8 + len(header)) // 4096) * 4096 - 8)
    with path.open("x+b") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        _reserve(file.fileno(), 8 + len(header) + at, path)
        if at:
            data = np.memmap(file, np.uint8, "r+", offset=8 + len(header), shape=(at,))
            read_ranges(store, list(_wants(ordered, starts, data)), read)
            data.flush()
        file.flush()
        os.fsync(file.fileno())


def _wants(
    tensors: Sequence[Tensor], starts: Sequence[int], data: npt.NDArray[np.uint8]
) -> Iterator[Want]:
    for tensor, start in zip(tensors, starts, strict=True):
        words = data[start : start + _size(tensor)].view(f"u{ITEM_BYTES[tensor.dtype]}")
        whole = words.reshape(tensor.shape)
        for held in tensor.pieces.values():
            piece = held[0]
            if piece.chunk.size:
                yield Want(piece.index, piece.chunk.start, piece.chunk.end, _Placed(piece, whole))


def _reserve(descriptor: int, size: int, path: Path) -> None:
    """Give a file its room. Were there none when a page of it is written, the process would die."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFullError(f"no room for {size} bytes: {path}") from error
        raise


def _require_all(files: Iterable[Path]) -> None:
    """Check that of files which say of how many they are none is missing."""
    sets: dict[tuple[str, int], list[int]] = {}
    for path in files:
        if match := _OF_SET.fullmatch(path.name):
            sets.setdefault((match[1], int(match[3])), []).append(int(match[2]))
    for (name, count), numbers in sets.items():
        # Most count from 1, some from 0.
        if sorted(numbers) != list(range(min(numbers), min(numbers) + len(numbers))) or (
            len(numbers) != count or min(numbers) > 1
        ):
            raise ForeignFormatError(
                f"{len(numbers)} files of {count} are there: {name}-*.safetensors of {path.parent}"
            )


def _parts(path: Path) -> Iterator[Part]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(HEADER_BYTES_MAX, size - 8):
            raise ForeignFormatError(f"header has {length} bytes, file {size}: {path}")
        table = _decoded(file.read(length), dict[str, msgspec.Raw], path)
    _require_no_pieces(table.pop(METADATA, None), path)
    entries = {name: _decoded(raw, _Entry, path) for name, raw in table.items()}
    _require_apart(entries, path)
    for name, entry in entries.items():
        begin, end = (8 + length + at for at in entry.data_offsets)
        if (
            not name
            or entry.dtype not in ITEM_BYTES
            or len(entry.shape) > DIMENSIONS_MAX
            or min((*entry.shape, *entry.data_offsets, 0)) < 0
            or end > size
            or end - begin != math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
        ):
            raise ForeignFormatError(
                f"tensor {name!r:.200} is {entry.dtype!r:.20} of shape "
                f"{reprlib.repr(entry.shape)} in bytes {begin} to {end} of {size}: {path}"
            )
        offset = (0,) * len(entry.shape)
        fill = _Filler(path, begin)
        yield Part(name, entry.dtype, entry.shape, entry.shape, offset, fill)


def _require_no_pieces(metadata: msgspec.Raw | None, path: Path) -> None:
    """Refuse the file of one rank that had pieces: nothing says how many ranks there were.

    Raises:
        UnstorableError: if it is one.
    """
    told = _decoded(metadata, dict[str, str], path) if metadata is not None else {}
    if _PLACES not in told:
        return
    placed = _decoded(told[_PLACES], dict[str, _Placing], path)
    if _OF_RANK.fullmatch(path.name) or any(any(one.saved_offsets) for one in placed.values()):
        error = UnstorableError(f"file has what one rank held, and maybe pieces of tensors: {path}")
        error.hint = "Save with enable_consolidation=True, or with torch's FileSystemWriter."
        raise error


def _require_apart(entries: Mapping[str, _Entry], path: Path) -> None:
    """Check that no bytes are of two tensors, of which one would be what it was not saved as."""
    placed = sorted((*one.data_offsets, name) for name, one in entries.items() if all(one.shape))
    for (_, end, one), (begin, _, other) in pairwise(placed):
        if begin < end:
            raise ForeignFormatError(
                f"tensors {one!r:.200} and {other!r:.200} have bytes in common: {path}"
            )


@dataclass(frozen=True, slots=True)
class _Filler:
    path: Path
    at: int

    def __call__(self, view: memoryview) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.at)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ForeignFormatError(f"file was cut off meanwhile: {self.path}")
                done += count


def _decoded(data: Any, kind: Any, path: Path) -> Any:  # noqa: ANN401 - of the kind that is asked for
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ForeignFormatError(f"JSON is not as expected ({error}): {path}") from error
