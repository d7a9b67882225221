"""Takes checkpoints to folders of torch's own format, and brings them in from there."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from storage.appearing import appearing
from storage.blob import BlobStore
from storage.contents import Beside, Contents
from storage.dcp.items import DTYPES, NAMES, pickled, tensor_over, value_of
from storage.dcp.reader import metadata_of
from storage.distcp import Box, Place, described
from storage.errors import ForeignFormatError
from storage.ranges import Want, read_ranges
from storage.transfer import Part, Told


def export_dcp(
    store: BlobStore, contents: Contents, out: Path, *, read: Told = lambda _: None
) -> None:
    """Write a checkpoint to a new folder that torch's `FileSystemReader` reads.

    Takes the memory of one piece of a tensor.

    Raises:
        FileExistsError: if there is something of that name.
        ShardCorruptError: if a byte is not what was staged; nothing is there then.
        OSError: from the file system.
    """
    with appearing(out) as folder, warnings.catch_warnings():
        # There is nobody to confer with, as it says.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
        try:
            save({}, storage_writer=writer, planner=_Stored(store, contents, read), no_dist=True)
        except CheckpointException as error:
            # Of ours alone, and not an Exception: what happened is inside.
            raise next(iter(error.failures.values()))[0] from None


def parts_of_dcp(folder: Path) -> tuple[list[Part], Beside]:
    """Return what a folder of torch's own format holds; reads all that is no tensor.

    Raises:
        ForbiddenPickleError: naming what its metadata asks for that no checkpoint needs.
        ForeignFormatError: if it is not whole.
        UnstorableError: if a value in it is not plain.
        OSError: if it can not be read.
    """
    told = described(folder)
    parts = [
        Part(name, tensor.dtype, sizes, tensor.shape, offset, fill)
        for name, tensor in sorted(told.tensors.items())
        for offset, (sizes, place) in sorted(tensor.pieces.items())
        for fill in [_Filler(folder, place, name, (tensor.dtype, sizes))]
    ]
    values = {
        name: value_of(io.BytesIO(_bytes(folder, place)), name)
        for name, place in sorted(told.values.items())
    }
    return parts, Beside(values=values, paths=told.paths)


class _Stored(SavePlanner):
    """Plans to save what a checkpoint holds, and reads each piece when its turn comes."""

    def __init__(self, store: BlobStore, contents: Contents, read: Told) -> None:
        self._store, self._contents, self._read = store, contents, read
        self._metadata = metadata_of(contents)

    def set_up_planner(
        self,
        state_dict: dict[str, object],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,  # noqa: FBT001, FBT002 - torch's signature
    ) -> None:
        """Do nothing: all is known."""

    def create_local_plan(self) -> SavePlan:
        """Return the items: every piece of every tensor, and every value."""
        items = []
        for name, held in self._metadata.state_dict_metadata.items():
            if isinstance(held, BytesStorageMetadata):
                index = MetadataIndex(name)
                kind = WriteItemType.BYTE_IO
                items.append(WriteItem(index, kind, bytes_io_data=BytesIOWriteData(0)))
                continue
            for number, chunk in enumerate(held.chunks):
                index = MetadataIndex(name, chunk.offsets, number)
                data = TensorWriteData(chunk, held.properties, held.size)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return the plan as it is."""
        return all_plans, self._metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return a piece or a value, read and verified now."""
        name = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            return pickled(self._contents.value(name))
        tensor = self._contents.tensors[name]
        piece = tensor.piece(tuple(write_item.index.offset or ()))
        landing = _Kept(bytearray(piece.chunk.size))
        if piece.chunk.size:
            want = Want(piece.index, piece.chunk.start, piece.chunk.end, landing)
            read_ranges(self._store, [want])
        self._read(piece.chunk.size)
        return tensor_over(memoryview(landing.data), DTYPES[tensor.dtype], piece.chunk.shape)


@dataclass(frozen=True, slots=True)
class _Kept:
    data: bytearray

    def take(self, at: int, piece: memoryview) -> None:
        self.data[at : at + len(piece)] = piece

    def done(self) -> None:
        """Do nothing: it is read at once."""


@dataclass(frozen=True, slots=True)
class _Filler:
    folder: Path
    place: Place
    name: str
    expected: tuple[str, Box]

    def __call__(self, view: memoryview) -> None:
        where = f"{self.name} in {self.folder / self.place.file}"
        tensor = _unpacked(_bytes(self.folder, self.place), where)
        found = (NAMES.get(tensor.dtype), tuple(tensor.shape))
        if found != self.expected or tensor.nbytes != len(view):
            # Of the same size, another type would go in as other numbers.
            raise ForeignFormatError(
                f"item is {tensor.dtype} of shape {found[1]}, metadata says {self.expected[0]} of "
                f"shape {self.expected[1]}: {where}"
            )
        tensor_over(view, tensor.dtype, found[1]).copy_(tensor)


def _unpacked(data: bytes, where: str) -> Tensor:
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises whatever the bytes lead it to
        what = str(error).strip().partition("\n")[0]
        raise ForeignFormatError(f"item does not decode ({what:.200}): {where}") from error
    if not isinstance(tensor, Tensor):
        raise ForeignFormatError(f"item is a {type(tensor).__name__}, expected a tensor: {where}")
    return tensor


def _bytes(folder: Path, place: Place) -> bytes:
    with (folder / place.file).open("rb") as file:
        file.seek(place.at)
        data = file.read(place.size)
    if len(data) != place.size:
        raise ForeignFormatError(f"file was cut off meanwhile: {folder / place.file}")
    return data
