"""A state that is saved in any cut and loaded in any other is the state, bit for bit."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise, product

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, ReadItem
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from storage import dcp, recut
from storage.catalog import Catalog
from storage.contents import Beside, read_contents
from storage.digest import combine, partial_digest
from storage.memory import MemoryStore
from storage.transfer import Part, bring_in

TYPES = {"U8": torch.uint8, "I16": torch.int16, "F32": torch.float32, "F64": torch.float64}
Box = tuple[tuple[int, int], ...]


class Boxes(DefaultLoadPlanner):
    """Loads boxes of tensors, each into memory of its own."""

    def __init__(self, targets: dict[tuple[str, tuple[int, ...]], Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        offset = tuple(read_item.dest_index.offset or ())
        tensor = self._targets[read_item.dest_index.fqn, offset]
        for dimension, start in enumerate(read_item.dest_offsets):
            tensor = tensor.narrow(dimension, start, read_item.lengths[dimension])
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        del read_item, tensor  # it is where it belongs


@st.composite
def states(draw: st.DrawFn) -> dict[str, tuple[str, Tensor]]:
    """Draw a few tensors of any bits: scalars, empty ones, and such as nothing divides."""
    state = {}
    for number in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(TYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
        size = math.prod(shape) * TYPES[name].itemsize
        raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
        flat = torch.frombuffer(raw, dtype=TYPES[name]) if size else torch.empty(0)
        state[f"t{number}"] = name, flat.to(TYPES[name]).reshape(shape)
    return state


def cut(draw: st.DataObject, shape: tuple[int, ...]) -> Iterator[Box]:
    """Draw a layout of a tensor: boxes that are all of it, as ranks of any mesh have them."""
    sides = []
    for size in shape:
        inner = draw.draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set[int]()
        sides.append(list(pairwise([0, *sorted(inner), size])))
    yield from product(*sides)


def of(tensor: Tensor, box: Box) -> Tensor:
    for dimension, (start, end) in enumerate(box):
        tensor = tensor.narrow(dimension, start, end - start)
    return tensor.contiguous()


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def filler(data: bytes) -> Callable[[memoryview], None]:
    def fill(view: memoryview) -> None:
        view[:] = data

    return fill


def stored(
    state: dict[str, tuple[str, Tensor]], shard_bytes: int, data: st.DataObject
) -> MemoryStore:
    """Return a store that has a state, in a layout that is drawn."""
    parts = []
    for name, (dtype, tensor) in state.items():
        for box in cut(data, tuple(tensor.shape)):
            piece = of(tensor, box)
            offset = tuple(start for start, _ in box)
            shapes = tuple(piece.shape), tuple(tensor.shape)
            parts.append(Part(name, dtype, *shapes, offset, filler(bits(piece))))
    store = MemoryStore()
    bring_in(
        store,
        data.draw(st.permutations(parts)),
        Beside(),
        step=1,
        run_id="r",
        shard_bytes=shard_bytes,
    )
    return store


@given(states(), st.integers(1, 300), st.data())
def test_any_layout_is_restored_into_any_other(
    state: dict[str, tuple[str, Tensor]], shard_bytes: int, data: st.DataObject
) -> None:
    store = stored(state, shard_bytes, data)

    reader, items, targets = dcp.StorageReader(store), list[ReadItem](), {}
    metadata = reader.read_metadata()
    for name, (dtype, tensor) in state.items():
        boxes = list(cut(data, tuple(tensor.shape)))
        for box in boxes:
            sizes = [end - start for start, end in box]
            offset = tuple(start for start, _ in box)
            targets[name, offset] = torch.zeros(sizes, dtype=TYPES[dtype])
        wanted = [
            ChunkStorageMetadata(
                torch.Size(start for start, _ in box), torch.Size(end - start for start, end in box)
            )
            for box in boxes
        ]
        held = metadata.state_dict_metadata[name]
        assert isinstance(held, TensorStorageMetadata)
        items += create_read_items_for_chunk_list(name, held, wanted)
    reader.read_data(LoadPlan(items), Boxes(targets)).wait()

    for (name, offset), found in targets.items():
        box = tuple((at, at + size) for at, size in zip(offset, found.shape, strict=True))
        assert bits(found) == bits(of(state[name][1], box))


@given(states(), st.integers(1, 300), st.data())
def test_boxes_of_any_layout_are_filled_from_any_other(
    state: dict[str, tuple[str, Tensor]], shard_bytes: int, data: st.DataObject
) -> None:
    store = stored(state, shard_bytes, data)
    boxes, expected = [], []
    for name, (dtype, tensor) in state.items():
        for box in cut(data, tuple(tensor.shape)):
            wanted = of(tensor, box)
            boxes.append(
                recut.Box(
                    name=name,
                    dtype=dtype,
                    global_shape=tuple(tensor.shape),
                    offset=tuple(start for start, _ in box),
                    shape=tuple(wanted.shape),
                    memory=memoryview(bytearray(len(bits(wanted)))),
                )
            )
            expected.append(bits(wanted))

    (record,) = Catalog(store).commits()
    assert record.manifest is not None
    recut.fill(store, read_contents(store, record.manifest), boxes)

    assert [bytes(box.memory) for box in boxes] == expected


@given(states(), st.data())
def test_the_digest_of_the_whole_is_that_of_its_rows_in_any_layout(
    state: dict[str, tuple[str, Tensor]], data: st.DataObject
) -> None:
    def digest(*, whole: bool) -> tuple[int, int]:
        lanes = []
        for name, (_, tensor) in state.items():
            flat = tensor.reshape(-1)
            boxes = [((0, len(flat)),)] if whole else cut(data, (len(flat),))
            lanes += [partial_digest(name, of(flat, box).numpy(), start=box[0][0]) for box in boxes]
        return combine(lanes)

    assert digest(whole=True) == digest(whole=False)
