"""Translates between what torch calls an item of a checkpoint and what a shard does."""

import io
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from storage.contents import STATE, Path
from storage.errors import UnstorableError
from storage.shard import Chunk
from storage.typed import Json, to_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMED = re.compile(r"\bGLOBAL (\S+)")
"""What torch says that it would not unpickle, in several lines of advice."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def chunk_of(item: WriteItem, number: int) -> Chunk:
    """Return what a tensor item is in a shard, as the piece of this number of its tensor there.

    Raises:
        UnstorableError: if safetensors has no such item type.
    """
    data = item.tensor_data
    assert data is not None
    dtype = NAMES.get(data.properties.dtype)
    if dtype is None:
        raise UnstorableError(
            f"dtype is {data.properties.dtype}, expected one of {', '.join(map(str, NAMES))}: "
            f"{item.index.fqn}"
        )
    return Chunk(
        fqn=item.index.fqn,
        state=f"{STATE}.{number}" if number else STATE,
        dtype=dtype,
        shape=tuple(data.chunk.sizes),
        global_shape=tuple(data.size),
        offset=tuple(data.chunk.offsets),
    )


def value_of(data: object, name: str) -> Json:
    """Return, in terms of JSON, the value that a planner has pickled in memory.

    Only what torch itself takes for harmless is unpickled.

    Raises:
        UnstorableError: if it is not plain.
    """
    if not isinstance(data, io.BytesIO):
        raise UnstorableError(f"planner made a {type(data).__name__}, expected bytes: {name}")
    data.seek(0)
    try:
        value = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises whatever the bytes lead it to
        named = _NAMED.search(str(error))
        what = named[1] if named else str(error).strip().partition("\n")[0]
        raise UnstorableError(f"value takes a pickle to store ({what:.300}): {name}") from error
    return to_json(value, name)


def pickled(value: object) -> io.BytesIO:
    """Return a value in the way in which planners want it, in memory."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def tensor_over(view: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor over memory of somebody else's, without a copy."""
    if not view.nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(view, dtype=dtype).view(shape)


def paths_of(planner_data: object, names: Mapping[str, object]) -> dict[str, list[str | int]]:
    """Return where in the nested state dict these names stand, as the default planner says.

    Raises:
        UnstorableError: if a planner keeps something else there.
    """
    if planner_data is None:
        return {}
    if not isinstance(planner_data, Mapping) or not all(
        isinstance(path, tuple) and all(isinstance(key, str | int) for key in path)
        for path in planner_data.values()
    ):
        raise UnstorableError(
            f"planner_data is a {type(planner_data).__name__}, expected a path of keys for each "
            "name, or None, as torch's own planners have it"
        )
    return {
        name: list(planner_data[name])
        for name in names
        if name in planner_data and planner_data[name] != (name,)
    }


def mapping_of(paths: Mapping[str, Path], names: Mapping[str, object]) -> dict[str, Path]:
    """Return `planner_data` for these names."""
    return {name: paths.get(name, (name,)) for name in names}
