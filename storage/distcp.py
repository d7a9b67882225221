"""Reads what a folder of torch.distributed.checkpoint says of itself, and runs nothing of it.

Its `.metadata` is a pickle, which may name anything to be called. Here only what torch puts there
is known, by name, and none of it is torch's own: each object becomes a bare record of what it was
made with, which is then looked at like any other data from outside. Ranks that did not confer left
a `__<rank>.metadata` each; they are put together.
"""

import io
import math
import pickle
import pickletools
import re
import reprlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

from storage.errors import ForbiddenPickleError, ForeignFormatError
from storage.shard import DIMENSIONS_MAX, ITEM_BYTES

METADATA = ".metadata"
METADATA_BYTES_MAX = 4 << 30
TUPLE_ITEMS_MAX = 1024
"""Of a tuple and all tuples in it: paths and shapes have few. Hashing goes through all of them, and
one that holds another twice, and so on, has more than could ever be gone through."""
_OF_RANK = re.compile(r"__(\d+)\.metadata")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    (_METADATA_MODULE, name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "WindowsPath"),
}

Box: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item lies: a file of the folder, its first byte there, and its length in bytes."""

    file: str
    at: int
    size: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in such a folder: by offset, the shape of each piece and where it lies."""

    dtype: str
    shape: Box
    pieces: dict[Box, tuple[Box, Place]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Described:
    """What such a folder says that it holds, with the names of a flat state dict."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    values: dict[str, Place] = field(default_factory=dict)
    paths: dict[str, list[str | int]] = field(default_factory=dict)


def is_one(folder: Path) -> bool:
    """Return whether a folder has such metadata."""
    return bool(_metadata_files(folder))


def described(folder: Path) -> Described:
    """Return what a folder says of itself; all the files that it names are there and long enough.

    Raises:
        ForbiddenPickleError: naming what the pickle asks for that no checkpoint needs.
        ForeignFormatError: if it is not such a folder, or not whole.
        OSError: if it can not be read.
    """
    told = Described()
    for path in _metadata_files(folder):
        with path.open("rb") as file:
            data = file.read(METADATA_BYTES_MAX + 1)
        if len(data) > METADATA_BYTES_MAX:
            raise ForeignFormatError(f"more than {METADATA_BYTES_MAX} bytes: {path}")
        record = unpickled(data, str(path))
        try:
            _enter(told, record, folder)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ForeignFormatError(f"metadata is not as torch writes it ({error}): {path}") from (
                error
            )
    for name, tensor in told.tensors.items():
        _require_whole(name, tensor, folder)
    return told


def unpickled(data: bytes, where: str) -> object:
    """Return what a pickle holds, with bare records in the place of torch's own objects.

    Raises:
        ForbiddenPickleError: naming what else it asks for.
        ForeignFormatError: if it is no pickle, or cut off.
    """
    try:
        _require_modest(data)
        return _Reader(data).load()
    except (ForbiddenPickleError, ForeignFormatError) as error:
        raise type(error)(f"{error}: {where}") from None
    except (Exception, MemoryError) as error:
        raise ForeignFormatError(f"pickle does not decode ({error!r:.200}): {where}") from error


class Record:
    """What an object was made with: `args` and, if it had any, `state`."""

    name: str = ""
    args: tuple[object, ...] = ()
    state: Any = None

    def __setstate__(self, state: Any) -> None:  # noqa: ANN401 - whatever the pickle says
        self.state = state

    def get(self, key: str) -> Any:  # noqa: ANN401 - whatever the pickle says
        """Return a field.

        Raises:
            KeyError: if there is none.
        """
        if not isinstance(self.state, dict):
            raise KeyError(f"{self.name} has no {key}")
        return self.state[key]


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - of many types
        if (module, name) in _RECORDS:
            return _recorder(name)
        if (module, name) == ("torch", "Size"):
            return _sizes
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _TORCH_DTYPES:
            return _TORCH_DTYPES[name]
        raise ForbiddenPickleError(f"pickle asks for {module}.{name}".replace("\n", " ")[:300])

    def persistent_load(self, pid: Any) -> Any:  # noqa: ANN401 - whatever the pickle says
        raise ForbiddenPickleError(f"pickle asks for an object from elsewhere, {_words(pid)}")


def _recorder(name: str) -> Callable[..., Record]:
    # A class of its own for each use: a pickle may set attributes on what it is given.
    class Made(Record):
        def __new__(cls, *_args: object) -> Self:
            return object.__new__(cls)

        def __init__(self, *args: object) -> None:
            self.args = args

    Made.name = name
    return Made


def _require_modest(data: bytes) -> None:
    """Check that to read a pickle takes no more memory or time than its length is worth.

    The list of numbered objects grows to the highest number, which four bytes can say; see also
    `TUPLE_ITEMS_MAX`. For each object on the stack, the items of a tuple are counted along.
    """
    stack: list[int | None] = []  # None is a mark
    kept: dict[int, int | None] = {}
    for code, argument, _ in pickletools.genops(data):
        if code.name in {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}:
            number = len(kept) if code.name == "MEMOIZE" else int(argument or 0)
            if number > len(data):
                raise ForeignFormatError(f"pickle numbers an object {number}")
            kept[number] = stack[-1]
        elif code.name in {"GET", "BINGET", "LONG_BINGET"}:
            stack.append(kept[int(argument or 0)])
        elif code.name == "LONG4":
            raise ForeignFormatError("pickle has a number of more than 255 bytes")
        else:
            _step(code, stack)


def _step(code: pickletools.OpcodeInfo, stack: list[int | None]) -> None:
    """Do to the stack what this code would do, with counts of items in the place of objects."""
    if code.name == "MARK":
        stack.append(None)
        return
    before = code.stack_before
    taken: list[int | None] = []
    if pickletools.markobject in before:
        while (item := stack.pop()) is not None:
            taken.append(item)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() for _ in before]
    counts = [count or 0 for count in taken]
    # Whatever is no tuple answers with what it was done to, or with something without items.
    items = len(counts) + sum(counts) if code.name.startswith("TUPLE") else sum(counts[-1:])
    if items > TUPLE_ITEMS_MAX:
        raise ForeignFormatError(f"pickle has a tuple of more than {TUPLE_ITEMS_MAX} items")
    stack += [items] * len(code.stack_after)


def _sizes(items: Any = ()) -> Box:  # noqa: ANN401 - whatever the pickle says
    return _box(tuple(items))


def _metadata_files(folder: Path) -> list[Path]:
    whole = folder / METADATA
    if whole.is_file():
        return [whole]
    ranks = [(path, _OF_RANK.fullmatch(path.name)) for path in sorted(folder.glob("__*.metadata"))]
    found = sorted((int(match[1]), path) for path, match in ranks if match)
    if [rank for rank, _ in found] != list(range(len(found))):
        names = ", ".join(path.name for _, path in found[:10])
        raise ForeignFormatError(f"metadata of a rank is missing, there are {names}: {folder}")
    return [path for _, path in found]


def _enter(told: Described, record: object, folder: Path) -> None:
    metadata = _record(record, "Metadata")
    places = {}
    for key, info in metadata.get("storage_data").items():
        index = _record(key, "MetadataIndex")
        at = index.state.get("offset")  # left out if there is none
        name, offset = _text(index.get("fqn")), None if at is None else _box(at)
        places[name, offset] = _place(_record(info, "_StorageInfo"), folder)
    for name, item in metadata.get("state_dict_metadata").items():
        if item.name == "BytesStorageMetadata":
            told.values.setdefault(_text(name), places[name, None])
        else:
            _enter_tensor(told, _text(name), _record(item, "TensorStorageMetadata"), places)
    for name, path in (metadata.get("planner_data") or {}).items():
        if not isinstance(path, tuple) or not all(type(key) in (str, int) for key in path):
            raise TypeError(f"path of {_words(name)} is {_words(path)}")
        if path != (name,):
            told.paths[_text(name)] = list(path)


def _enter_tensor(
    told: Described, name: str, item: Record, places: dict[tuple[str, Box | None], Place]
) -> None:
    dtype = _record(item.get("properties"), "TensorProperties").state[0]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype is {_words(dtype)}: {name}")
    shape = _box(item.get("size"))
    tensor = told.tensors.setdefault(name, StoredTensor(dtype, shape))
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        raise ValueError(f"ranks have {name} in different shapes or types")
    for chunk in item.get("chunks"):
        offset = _box(_record(chunk, "ChunkStorageMetadata").get("offsets"))
        sizes = _box(chunk.get("sizes"))
        if len({len(shape), len(offset), len(sizes)}) > 1 or any(
            at + size > whole for at, size, whole in zip(offset, sizes, shape, strict=True)
        ):
            raise ValueError(f"box of shape {sizes} at {offset} is not inside {shape}: {name}")
        tensor.pieces.setdefault(offset, (sizes, places[name, offset]))


def _place(info: Record, folder: Path) -> Place:
    if info.state and (through := info.state.get("transform_descriptors")):
        raise ValueError(f"items went through {_words(through)}")
    file, at, size = _text(info.get("relative_path")), info.get("offset"), info.get("length")
    if not _FILE.fullmatch(file):
        raise ValueError(f"file is {_words(file)}, expected one in the folder itself")
    if type(at) is not int or type(size) is not int or at < 0 or size < 0:
        raise ValueError(f"bytes {_words(at)} and {_words(size)} of {_words(file)}")
    path = folder / file
    there = path.stat().st_size if path.is_file() else None
    if there is None or there < at + size:
        found = "is not there" if there is None else f"has {there} bytes"
        raise ForeignFormatError(f"file {found}, metadata says {at + size} or more: {path}")
    return Place(file, at, size)


def _record(value: object, name: str) -> Record:
    if not isinstance(value, Record) or value.name != name:
        raise TypeError(f"{_words(value)} is no {name}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{_words(value)} is no text")
    return value


def _box(value: object) -> Box:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise TypeError(f"{_words(value)} are no sizes")
    if len(value) > DIMENSIONS_MAX:
        raise ValueError(f"{len(value)} dimensions, may have {DIMENSIONS_MAX}")
    return value


def _require_whole(name: str, tensor: StoredTensor, folder: Path) -> None:
    held = sum(math.prod(sizes) for sizes, _ in tensor.pieces.values())
    if not tensor.pieces or held != math.prod(tensor.shape):
        raise ForeignFormatError(
            f"{held} of {math.prod(tensor.shape)} elements are there: {name:.200} of {folder}"
        )


def _words(value: object) -> str:
    """Return some words for an object, without a look at all that may be in it."""
    if isinstance(value, str | int | float | bytes | None):
        return reprlib.repr(value)
    return value.name if isinstance(value, Record) else f"a {type(value).__name__}"
