"""Boxes of another layout than the stored one: what is refused, and what is read for them."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from storage import recut, shard
from storage.commit import commit, write_shard
from storage.contents import Contents, read_contents
from storage.digest import BLOCK_BYTES
from storage.errors import ForeignCheckpointError, ShardCorruptError
from storage.manifest import body_key, make_manifest
from storage.memory import MemoryStore

Box = tuple[int, int]
"""First row of a shard, and how many."""
WHOLE: npt.NDArray[np.float32] = np.arange(24, dtype=np.float32).reshape(8, 3)
TP_2_OVER_3: list[Box] = [(0, 2), (2, 2), (4, 0), (4, 2), (6, 2), (8, 0)]
"""Two halves of four rows, each of them cut for three: for the third, no rows are left."""


def stored(rows: list[Box], whole: npt.NDArray[np.float32] = WHOLE) -> tuple[MemoryStore, Contents]:
    store, receipts = MemoryStore(), []
    for number, (first, count) in enumerate(rows):
        chunk = shard.Chunk(
            fqn="w",
            state="param",
            dtype="F32",
            shape=(count, *whole.shape[1:]),
            global_shape=whole.shape,
            offset=(first, 0),
        )
        plan = shard.plan([chunk])
        body = bytearray(plan.size)
        if count:
            plan.views(body)["param/w"][:] = whole[first : first + count].tobytes()
        meta = shard.ShardMeta(
            run_id="r", model="m", step=5, epoch=1, shard=number, shards=len(rows)
        )
        receipts.append(write_shard(store, shard.seal(plan, body, meta), body))
    manifest = make_manifest(receipts, run_id="r", model="m", step=5, epoch=1)
    commit(store, manifest, newest_epoch_known=1)
    return store, read_contents(store, manifest)


def box(first: int, count: int, columns: Box = (0, 3), *, dtype: str = "F32") -> recut.Box:
    shape = (count, columns[1])
    return recut.Box(
        name="param.w",
        dtype=dtype,
        global_shape=WHOLE.shape,
        offset=(first, columns[0]),
        shape=shape,
        memory=memoryview(bytearray(4 * math.prod(shape))),
    )


def values(of: recut.Box) -> npt.NDArray[np.float32]:
    return np.frombuffer(of.memory, np.float32).reshape(of.shape)


def test_ranks_for_which_no_rows_were_left_stand_in_nobody_s_way() -> None:
    store, contents = stored(TP_2_OVER_3)
    first, second = box(0, 5), box(5, 3, (1, 2))

    recut.fill(store, contents, [first, second, box(8, 0)])

    assert np.array_equal(values(first), WHOLE[:5])
    assert np.array_equal(values(second), WHOLE[5:, 1:])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"name": "param.v"}, "param.v is not there, expected F32 of shape"),
        ({"dtype": "I32"}, r"param.w is F32 of shape \[8, 3\], expected I32"),
        ({"global_shape": (9, 3)}, r"expected F32 of shape \[9, 3\]"),
    ],
)
def test_what_is_another_tensor_is_refused(changed: dict[str, Any], says: str) -> None:
    store, contents = stored([(0, 4), (4, 4)])

    with pytest.raises(ForeignCheckpointError, match=says):
        recut.fill(store, contents, [replace(box(0, 4), **changed)])


def test_a_flipped_bit_is_found_and_told_with_the_body_it_is_in() -> None:
    store, contents = stored([(0, 4), (4, 4)])
    key = body_key(5, 1, 1)
    body = bytearray(store.get(key))
    body[-1] ^= 1
    store.delete(key)
    store.put(key, body)

    with pytest.raises(ShardCorruptError, match=f"crc32c of bytes .* {key}"):
        recut.fill(store, contents, [box(0, 8)])


def test_of_a_body_only_the_blocks_with_wanted_rows_are_read() -> None:
    whole = np.zeros((8, 2 * BLOCK_BYTES // 16), np.float32)
    whole[:, 0] = range(8)
    store, contents = stored([(0, 8)], whole)
    read: list[int] = []
    wanted = replace(
        box(0, 1),
        global_shape=whole.shape,
        shape=(1, whole.shape[1]),
        offset=(5, 0),
        memory=memoryview(bytearray(4 * whole.shape[1])),
    )

    recut.fill(store, contents, [wanted], read.append)

    assert values(wanted)[0, 0] == 5
    assert sum(read) <= 2 * BLOCK_BYTES < whole.nbytes
