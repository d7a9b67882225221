"""Reads and writes what `torch.save` makes of a dictionary of tensors, without running any of it.

Such a file is a zip: `data.pkl` says what there is, each `data/N` holds the bytes of a tensor. The
pickle is a program, and one from elsewhere may do anything. So it is not run: a machine that knows
the twenty-odd instructions which such a dictionary takes, and four names, reads it; whatever else
it says is refused by name (trainer.weights.machine).
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, BinaryIO

import torch
from torch._utils import _rebuild_tensor_v2

from orchestrator.worker import MisconfiguredError
from trainer.weights import machine
from trainer.weights.files import SMALL_BYTES_MAX, Folder
from trainer.weights.safetensors import Planned
from trainer.weights.spans import DAMAGED, Span, bytes_of

_LOCAL = struct.Struct("<4s22xHH")
_TENSORS_MAX = 1 << 20
_STORAGES: dict[torch.dtype, type] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


def read_table(folder: Folder, file: str) -> dict[str, Span]:
    """Return where every tensor of a file lies, by name.

    Raises:
        MisconfiguredError: if it is no such file, is cut short, or its pickle asks for more.
    """
    where = folder.where(file)
    members = _members(folder, file)
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise MisconfiguredError(
            f"{len(roots)} data.pkl in the zip, expected 1: {where}",
            hint="expected what torch.save makes of a dictionary of tensors",
        )
    (root,) = roots
    order = b"little"
    if f"{root}byteorder" in members:
        order = _content(folder, file, members, root, "byteorder")
    if order != b"little":
        raise MisconfiguredError(
            f"byte order is {order!r:.40}, expected b'little': {where}",
            hint="save it again on a common machine",
        )
    program = _content(folder, file, members, root, "data.pkl")
    tensors = machine.tensors_of(program, where)
    return {
        name: _span(folder, file, members, f"{root}data/{tensor.storage.key}", name, tensor)
        for name, tensor in tensors.items()
    }


def _members(folder: Folder, file: str) -> dict[str, zipfile.ZipInfo]:
    where, size = folder.where(file), folder.size(file)
    with folder.opened(file) as opened:
        # NotImplementedError is no code of ours left to be written: it is how the library refuses
        # a member whose kind of compression or encryption takes a newer version of zip than 6.3.
        try:
            infos = zipfile.ZipFile(opened).infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise MisconfiguredError(
                f"no zip as torch.save makes it: {error}: {where}",
                hint=f"{DAMAGED}; what torch before 1.6 saved is not read: load and save it anew",
            ) from error
    for info in infos:
        stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        fits = info.compress_size == info.file_size <= size - max(info.header_offset, 0)
        if not stored or not fits or info.header_offset < 0:
            raise MisconfiguredError(
                f"{info.filename!r} has {info.file_size} bytes, {info.compress_size} in the file, "
                f"expected as many, as they are: {where}",
                hint=DAMAGED,
            )
    found = {info.filename: info for info in infos}
    if len(found) != len(infos) or len(infos) > _TENSORS_MAX:
        raise MisconfiguredError(f"a name is twice in the zip: {where}", hint=DAMAGED)
    return found


def _content(
    folder: Folder, file: str, members: dict[str, zipfile.ZipInfo], root: str, name: str
) -> bytes:
    info = members[f"{root}{name}"]
    if info.file_size > SMALL_BYTES_MAX:
        raise MisconfiguredError(
            f"{name} has {info.file_size} bytes, expected at most {SMALL_BYTES_MAX}: "
            f"{folder.where(file)}",
            hint="expected what torch.save makes of a dictionary of tensors",
        )
    content = bytearray(info.file_size)
    folder.fill(file, _data_start(folder, file, info), memoryview(content))
    return bytes(content)


def _data_start(folder: Folder, file: str, info: zipfile.ZipInfo) -> int:
    """Return where the bytes of a member begin: behind a header of its own."""
    head = bytearray(_LOCAL.size)
    folder.fill(file, info.header_offset, memoryview(head))
    signature, name, extra = _LOCAL.unpack(head)
    start: int = info.header_offset + _LOCAL.size + name + extra
    if signature != b"PK\3\4" or start + info.file_size > folder.size(file):
        raise MisconfiguredError(
            f"no {info.filename!r} at byte {info.header_offset}: {folder.where(file)}", hint=DAMAGED
        )
    return start


def _span(
    folder: Folder,
    file: str,
    members: dict[str, zipfile.ZipInfo],
    member: str,
    name: str,
    tensor: machine.TensorRecord,
) -> Span:
    where = f"{name}: {folder.where(file)}"
    info = members.get(member)
    item = tensor.storage.dtype.itemsize
    if info is None or info.file_size != tensor.storage.numel * item:
        found = "not there" if info is None else f"{info.file_size} bytes"
        raise MisconfiguredError(
            f"{member} is {found}, expected {tensor.storage.numel * item} bytes: {where}",
            hint=DAMAGED,
        )
    numel = math.prod(tensor.size)
    if tensor.offset + numel > tensor.storage.numel:
        raise MisconfiguredError(
            f"{numel} values from {tensor.offset}, its storage has {tensor.storage.numel}: {where}",
            hint=DAMAGED,
        )
    return Span(
        folder=folder,
        file=file,
        start=_data_start(folder, file, info) + tensor.offset * item,
        shape=tensor.size,
        dtype=tensor.storage.dtype,
        crc=info.CRC if numel == tensor.storage.numel else None,
    )


class _Storage:
    """Stands for the bytes of a tensor that are written beside the pickle."""

    def __init__(self, key: str, tensor: Planned) -> None:
        self.key, self.tensor = key, tensor


class _Tensor:
    """Pickles as a tensor does, and has no values."""

    def __init__(self, key: str, tensor: Planned) -> None:
        self.storage, self.shape = _Storage(key, tensor), tensor.shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self.shape, device="meta").stride()
        hooks: OrderedDict[str, Any] = OrderedDict()
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, hooks)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:  # noqa: ANN401 - the library's own signature
        if not isinstance(obj, _Storage):
            return None
        numel = math.prod(obj.tensor.shape)
        return "storage", _STORAGES[obj.tensor.dtype], obj.key, "cpu", numel


def write(file: BinaryIO, tensors: Iterable[Planned]) -> None:
    """Write a file that `torch.load` reads as a dictionary of these tensors, one at a time."""
    planned = list(tensors)
    program = io.BytesIO()
    _Pickler(program, protocol=2).dump(
        {tensor.name: _Tensor(str(key), tensor) for key, tensor in enumerate(planned)}
    )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        small = {"data.pkl": program.getvalue(), "byteorder": b"little", "version": b"3\n"}
        for name, content in small.items():
            archive.writestr(_named(name), content)
        for key, tensor in enumerate(planned):
            with archive.open(_named(f"data/{key}"), "w", force_zip64=True) as member:
                member.write(bytes_of(tensor.make()))


def _named(name: str) -> zipfile.ZipInfo:
    # Without the time of day: the same weights make the same file.
    return zipfile.ZipInfo(f"consolidated/{name}")
