"""One bit flipped anywhere in a checkpoint makes the older one win, and the reason is told."""

from contextlib import nullcontext
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.blob import BlobStore
from storage.catalog import Catalog
from storage.commit import commit, write_shard
from storage.faulty import FaultyStore
from storage.manifest import commit_key, generation_prefix, make_manifest
from storage.memory import MemoryStore
from storage.shard import Chunk, ShardMeta, plan, seal
from tests.checkpoints import in_groups

LAYOUT = plan(
    [
        Chunk(fqn=name, state="param", dtype=dtype, shape=(9,), global_shape=(18,), offset=(9,))
        for name, dtype in (("a", "F32"), ("b", "BF16"), ("c", "U8"))
    ]
)
SHARDS = 2


def save(store: BlobStore, step: int) -> None:
    receipts = []
    for shard in range(SHARDS):
        body = bytearray(LAYOUT.size)
        meta = ShardMeta(
            run_id="run",
            model="m",
            step=step,
            epoch=1,
            shard=shard,
            shards=SHARDS,
            extra={"cursor": 12345, "lr": 3e-4, "source": "c4"},
        )
        receipts.append(write_shard(store, seal(LAYOUT, body, meta), body))
    manifest = make_manifest(
        receipts, run_id="run", model="m", step=step, epoch=1, layout={"mesh": [2, 1]}
    )
    commit(store, manifest, newest_epoch_known=1)


@cache
def two_checkpoints(*, grouped: bool = False) -> MemoryStore:
    store = MemoryStore()
    save(store, 10)
    with in_groups() if grouped else nullcontext():
        save(store, 20)
    return store


def files_of_the_newer(*, grouped: bool = False) -> list[str]:
    """Return them; of groups there is one more."""
    store = two_checkpoints(grouped=grouped)
    return [commit_key(20, 1), *store.keys(generation_prefix(20, 1))]


@given(st.booleans(), st.data())
def test_a_bit_flipped_in_any_file_makes_the_older_checkpoint_win(
    grouped: bool,  # noqa: FBT001 - drawn
    data: st.DataObject,
) -> None:
    inner = two_checkpoints(grouped=grouped)
    key = data.draw(st.sampled_from(files_of_the_newer(grouped=grouped)))
    bit = data.draw(st.integers(0, inner.size(key) * 8 - 1))
    store = FaultyStore(inner, flips={key: bit})

    found, rejections = Catalog(store).newest_verified(run_id="run", model="m")

    assert found is not None
    assert found.step == 10
    assert [(r.step, r.epoch) for r in rejections] == [(20, 1)]
    assert rejections[0].reason


@pytest.mark.parametrize("grouped", [False, True])
def test_one_bit_in_every_byte_of_every_file_is_noticed(*, grouped: bool) -> None:
    inner = two_checkpoints(grouped=grouped)
    store = FaultyStore(inner)
    for key in files_of_the_newer(grouped=grouped):
        # Padding is a third of a small body; every 7th byte of it stands for the rest.
        for byte in range(0, inner.size(key), 7 if key.endswith(".st") else 1):
            store.flips = {key: byte * 8 + byte % 8}
            found, _ = Catalog(store).newest_verified()
            assert found is not None
            assert found.step == 10, f"byte {byte} of {key}"


@pytest.mark.parametrize("grouped", [False, True])
def test_a_file_cut_short_or_grown_makes_the_older_checkpoint_win(*, grouped: bool) -> None:
    two = two_checkpoints(grouped=grouped)
    for key in files_of_the_newer(grouped=grouped):
        for change in (lambda data: data[:-1], lambda data: data + b" ", lambda _: b""):
            store = MemoryStore()
            everything = two.keys()
            for other in everything:
                data = two.get(other)
                store.put(other, change(data) if other == key else data)

            found, rejections = Catalog(store).newest_verified()

            assert found is not None
            assert found.step == 10, key
            assert len(rejections) == 1
