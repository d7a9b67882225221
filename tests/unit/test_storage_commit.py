"""Writing shards, committing generations, reading them back."""

import time
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from storage.blob import BlobStore
from storage.commit import (
    BLOCKS_AHEAD,
    check_shard,
    commit,
    fetch_body,
    fetch_index,
    fetch_shard,
    latest_commit,
    newest_epoch,
    pour_body,
    write_shard,
)
from storage.digest import BLOCK_BYTES, PASS_BYTES, block_crcs
from storage.errors import (
    BlobExistsError,
    BlobNotFoundError,
    ForeignCheckpointError,
    ManifestCorruptError,
    ShardCorruptError,
    StaleEpochError,
    StorageFullError,
    StorageUnavailableError,
    UnstorableError,
    UnsupportedVersionError,
)
from storage.faulty import FaultyStore
from storage.manifest import (
    Manifest,
    ShardReceipt,
    body_key,
    commit_key,
    decode_manifest,
    encode_manifest,
    index_key,
    make_manifest,
    parse_commit_key,
    parse_generation_key,
    parse_verdict_key,
    verdict_key,
)
from storage.memory import MemoryStore
from storage.shard import (
    INDEX_BYTES_MAX,
    Chunk,
    ShardIndex,
    ShardMeta,
    as_staged,
    decode_index,
    index_digest,
    plan,
    seal,
)

CHUNK = Chunk(fqn="w", state="param", dtype="F32", shape=(8,), global_shape=(16,), offset=(0,))
LAYOUT = plan([CHUNK])


def staged(step: int, epoch: int, shard: int = 0, fill: int = 1) -> tuple[ShardIndex, bytearray]:
    body = bytearray(LAYOUT.size)
    LAYOUT.views(body)["param/w"][:] = bytes([fill]) * 32
    meta = ShardMeta(run_id="run", model="m", step=step, epoch=epoch, shard=shard, shards=2)
    return seal(LAYOUT, body, meta), body


def written(store: BlobStore, step: int, epoch: int, fill: int = 1) -> Manifest:
    receipts = [write_shard(store, *staged(step, epoch, shard, fill)) for shard in (1, 0)]
    return make_manifest(receipts, run_id="run", model="m", step=step, epoch=epoch)


def test_a_committed_shard_is_fetched_as_it_was_staged() -> None:
    store = MemoryStore()
    manifest = written(store, 100, 2)

    commit(store, manifest, newest_epoch_known=2)

    assert decode_manifest(store.get(commit_key(100, 2))) == manifest
    assert fetch_shard(store, manifest, 1) == staged(100, 2, 1)
    assert latest_commit(store) == (2, 100)


def test_a_shard_is_fetched_into_the_callers_larger_buffer() -> None:
    store = MemoryStore()
    manifest = written(store, 100, 2)
    shared = bytearray(LAYOUT.size + 4096)

    index = fetch_index(store, manifest, 0)
    fetch_body(store, index, shared)

    assert shared[: index.size] == staged(100, 2)[1]
    with pytest.raises(ValueError, match="writable"):
        fetch_body(store, index, shared[: index.size - 1])


def test_a_body_is_poured_in_order_from_little_memory() -> None:
    store, (index, body) = MemoryStore(), large(17 << 20)
    write_shard(store, index, body)
    poured, rooms = bytearray(), set()

    def write(start: int, content: memoryview) -> None:
        assert start == len(poured)
        poured.extend(content)
        rooms.add(np.frombuffer(content, np.uint8).ctypes.data)

    pour_body(store, index, write)

    assert poured == body
    assert len(rooms) == BLOCKS_AHEAD * BLOCK_BYTES // PASS_BYTES < index.size // PASS_BYTES


def test_what_is_stored_has_the_sums_of_all_blocks_and_can_be_written_again() -> None:
    store, (index, body) = MemoryStore(), large(5 << 20)

    receipts = [write_shard(store, index, body) for _ in range(2)]

    key = index_key(index.step, index.epoch, index.shard)
    stored = decode_index(store.get(key))
    assert list(stored.crc32c) == block_crcs(body)
    assert len(stored.crc32c) == 2
    assert as_staged(stored) == index
    assert {receipt.index_digest for receipt in receipts} == {index_digest(stored)}


def test_room_that_can_not_be_had_ends_a_pouring_with_what_says_so() -> None:
    store, (index, body) = MemoryStore(), large(10 << 20)
    write_shard(store, index, body)

    def write(start: int, content: memoryview) -> None:
        if start:
            raise MemoryError(f"{len(content)} bytes")

    with pytest.raises(MemoryError, match=f"{PASS_BYTES} bytes"):
        pour_body(store, index, write)


@pytest.mark.parametrize("at", [0, 5000, -1])
def test_a_body_that_is_damaged_in_the_store_is_not_poured_to_the_end(at: int) -> None:
    store, (index, body) = FaultyStore(MemoryStore()), large(5 << 20)
    write_shard(store, index, body)
    store.flips[body_key(100, 2, 0)] = 8 * (at % index.size)

    with pytest.raises(ShardCorruptError, match=r"xxh3-128|crc32c"):
        pour_body(store, index, lambda _, __: None)


def test_a_shard_damaged_after_staging_is_not_written() -> None:
    store = MemoryStore()
    index, body = staged(100, 2)
    body[-1] ^= 1

    with pytest.raises(ShardCorruptError, match="param/w"):
        write_shard(store, index, body)

    assert store.keys() == []


def test_writing_the_same_shard_again_gives_the_same_receipt() -> None:
    store = MemoryStore()

    assert write_shard(store, *staged(100, 2)) == write_shard(store, *staged(100, 2))


def test_another_shard_of_the_same_number_is_refused_and_the_first_stays() -> None:
    store = MemoryStore()
    receipt = write_shard(store, *staged(100, 2, fill=1))

    with pytest.raises(BlobExistsError, match=r"s0\.st"):
        write_shard(store, *staged(100, 2, fill=2))

    assert write_shard(store, *staged(100, 2, fill=1)) == receipt


def test_the_same_body_under_another_index_is_refused() -> None:
    store = MemoryStore()
    index, body = staged(100, 2)
    write_shard(store, index, body)

    with pytest.raises(BlobExistsError, match=r"s0\.idx"):
        write_shard(store, msgspec.structs.replace(index, extra={"cursor": 1}), body)


def test_a_body_that_was_torn_by_the_store_is_never_committed() -> None:
    store = FaultyStore(MemoryStore(), tear_at=4100)
    with pytest.raises(Exception, match="connection lost"):
        write_shard(store, *staged(100, 2))

    with pytest.raises(BlobExistsError, match="another body"):
        write_shard(store, *staged(100, 2))


def test_a_full_store_loses_the_generation_and_nothing_else() -> None:
    store = FaultyStore(MemoryStore())
    manifest = written(store, 100, 2)
    store.full = True

    with pytest.raises(StorageFullError):
        commit(store, manifest, newest_epoch_known=2)
    assert store.keys("commits/") == []

    store.full = False
    commit(store, manifest, newest_epoch_known=2)


def test_committing_the_same_manifest_again_is_fine_even_after_later_ones() -> None:
    store = MemoryStore()
    first = written(store, 100, 2)
    commit(store, first, newest_epoch_known=2)
    commit(store, written(store, 110, 2), newest_epoch_known=2)

    commit(store, first, newest_epoch_known=2)

    assert store.keys("commits/") == [commit_key(110, 2), commit_key(100, 2)]


def test_a_different_manifest_for_a_committed_generation_is_refused() -> None:
    store = MemoryStore()
    manifest = written(store, 100, 2)
    commit(store, manifest, newest_epoch_known=2)
    entries = [msgspec.structs.replace(e, index_digest="0" * 64) for e in manifest.receipts()]
    other = make_manifest(entries, run_id="run", model="m", step=100, epoch=2)

    with pytest.raises(BlobExistsError, match="committed is"):
        commit(store, other, newest_epoch_known=2)


@pytest.mark.parametrize("known", [0, 3])
def test_a_commit_of_an_older_epoch_is_refused_and_leaves_nothing(known: int) -> None:
    store = MemoryStore()
    commit(store, written(store, 50, 3), newest_epoch_known=3)
    zombie = written(store, 60, 2)

    with pytest.raises(StaleEpochError, match="checkpoint of step 60, epoch 2"):
        commit(store, zombie, newest_epoch_known=known)

    assert store.keys("commits/") == [commit_key(50, 3)]


def test_an_older_epoch_that_only_the_caller_knows_of_is_refused_too() -> None:
    store = MemoryStore()

    with pytest.raises(StaleEpochError, match="newest epoch known is 4"):
        commit(store, written(store, 60, 2), newest_epoch_known=4)


def test_a_step_that_was_overtaken_by_a_later_commit_is_refused() -> None:
    """The collector may have taken its shards already."""
    store = MemoryStore()
    late = written(store, 100, 2)
    commit(store, written(store, 110, 2), newest_epoch_known=2)

    with pytest.raises(StaleEpochError, match="step 110 of epoch 2"):
        commit(store, late, newest_epoch_known=2)


def test_a_newer_epoch_may_commit_an_earlier_step() -> None:
    store = MemoryStore()
    commit(store, written(store, 200, 2), newest_epoch_known=2)

    commit(store, written(store, 150, 3), newest_epoch_known=3)

    assert latest_commit(store) == (3, 150)


@pytest.mark.parametrize("step_of_rival", [100, 90, 130])
def test_a_newer_epoch_that_commits_between_look_and_put_wins(step_of_rival: int) -> None:
    inner = MemoryStore()
    zombie = written(inner, 100, 2)
    rival = written(inner, step_of_rival, 3)

    def overtake(operation: str, key: str) -> None:
        if operation == "put" and key == commit_key(100, 2):
            commit(inner, rival, newest_epoch_known=3)

    with pytest.raises(StaleEpochError, match="of epoch 3"):
        commit(FaultyStore(inner, before=overtake), zombie, newest_epoch_known=2)

    assert inner.keys("commits/") == [commit_key(step_of_rival, 3)]


@pytest.mark.parametrize("key_of", [body_key, index_key])
def test_a_commit_without_all_its_shards_is_refused(
    key_of: Callable[[int, int, int], str],
) -> None:
    store = MemoryStore()
    manifest = written(store, 100, 2)
    store.delete(key_of(100, 2, 1))

    with pytest.raises(BlobNotFoundError, match="shard 1 is not"):
        commit(store, manifest, newest_epoch_known=2)

    assert store.keys("commits/") == []


def test_the_newest_epoch_is_that_of_whatever_any_writer_has_left_in_the_store() -> None:
    store = MemoryStore()
    assert newest_epoch(store) == 0
    commit(store, written(store, 40, epoch=2), newest_epoch_known=2)
    assert newest_epoch(store) == 2
    store.put(verdict_key(60, 3, 0, "deleting"), b"")
    assert newest_epoch(store) == 3
    write_shard(store, *staged(20, 5))
    assert newest_epoch(store) == 5


def test_an_index_that_was_exchanged_is_found() -> None:
    store = MemoryStore()
    manifest = written(store, 100, 2)
    store.delete(index_key(100, 2, 0))
    store.put(index_key(100, 2, 0), store.get(index_key(100, 2, 1)))

    with pytest.raises(ShardCorruptError, match="manifest says"):
        check_shard(store, manifest, 0)


def test_shards_of_another_run_are_not_taken_for_ours() -> None:
    store = MemoryStore()
    receipts = [write_shard(store, *staged(100, 2, shard)) for shard in (0, 1)]
    manifest = make_manifest(receipts, run_id="other", model="m", step=100, epoch=2)

    with pytest.raises(ForeignCheckpointError, match="manifest is of"):
        fetch_shard(store, manifest, 0)


def test_a_body_of_the_wrong_size_is_refused_before_memory_is_taken() -> None:
    store = MemoryStore()
    manifest = written(store, 100, 2)
    store.delete(body_key(100, 2, 0))
    store.put(body_key(100, 2, 0), b"short")

    with pytest.raises(ShardCorruptError, match="body has 5 bytes"):
        fetch_shard(store, manifest, 0)


@pytest.mark.parametrize("shard", [-1, 2])
def test_a_shard_that_the_manifest_does_not_have_is_a_callers_mistake(shard: int) -> None:
    store = MemoryStore()

    with pytest.raises(ValueError, match=r"0\.\.1"):
        fetch_index(store, written(store, 100, 2), shard)


@pytest.mark.parametrize("shards", [[], [0, 2], [1], [0, 0]])
def test_receipts_with_gaps_or_repeats_make_no_manifest(shards: list[int]) -> None:
    receipts = [ShardReceipt(shard=n, size=1, index_digest="0" * 64) for n in shards]

    with pytest.raises(ValueError, match="receipts"):
        make_manifest(receipts, run_id="r", model="m", step=1, epoch=0)


def test_any_byte_changed_in_a_manifest_is_found() -> None:
    data = encode_manifest(written(MemoryStore(), 100, 2))

    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises((ManifestCorruptError, UnsupportedVersionError)):
            decode_manifest(changed)


def test_the_same_manifest_in_other_bytes_is_refused() -> None:
    data = encode_manifest(written(MemoryStore(), 100, 2))

    with pytest.raises(ManifestCorruptError, match="canonical"):
        decode_manifest(data + b"\n")


def test_keys_of_newer_steps_sort_first_and_parse_back() -> None:
    keys = [commit_key(step, 1) for step in (0, 9, 10, 10**9)]

    assert sorted(keys) == keys[::-1]
    assert [parse_commit_key(key) for key in keys] == [(0, 1), (9, 1), (10, 1), (10**9, 1)]
    assert parse_generation_key(body_key(12, 3, 4)) == (12, 3)
    assert parse_generation_key(index_key(12, 3, 4)) == (12, 3)
    assert parse_verdict_key(verdict_key(12, 3, 0, "quarantined")) == (12, 3, "quarantined")
    assert parse_commit_key("commits/readme") is parse_generation_key("gen/x") is None


def large(items: int) -> tuple[ShardIndex, bytearray]:
    """A shard of more than one block."""
    layout = plan(
        [Chunk(fqn="w", state="p", dtype="F32", shape=(items,), global_shape=(items,), offset=(0,))]
    )
    body = bytearray(layout.size)
    meta = ShardMeta(run_id="run", model="m", step=100, epoch=2, shard=0, shards=1)
    return seal(layout, body, meta), body


def test_of_a_large_body_that_was_damaged_nothing_stays() -> None:
    """It is verified while the store takes it already."""
    store, (index, body) = MemoryStore(), large(5 << 20)
    body[-1] ^= 1

    with pytest.raises(ShardCorruptError, match="p/w"):
        write_shard(store, index, body)

    assert store.keys() == []
    body[-1] ^= 1
    write_shard(store, index, body)
    body[-1] ^= 1
    with pytest.raises(ShardCorruptError, match="p/w"):
        write_shard(store, index, body)
    # What is there already is not what was damaged.
    assert store.keys() == [index_key(100, 2, 0), body_key(100, 2, 0)]


def test_a_damaged_body_that_can_not_be_deleted_is_damage_and_no_slow_store() -> None:
    store, (index, body) = FaultyStore(MemoryStore()), large(5 << 20)
    body[-1] ^= 1
    store.before = lambda operation, _key: setattr(store, "down", operation == "delete")

    with pytest.raises(ShardCorruptError, match=r"p/w.*not be deleted: no answer to delete"):
        write_shard(store, index, body)


def test_an_index_that_no_reader_would_take_is_refused_before_anything_is_stored() -> None:
    store, body = MemoryStore(), bytearray(LAYOUT.size)
    meta = ShardMeta(run_id="run", model="m", step=1, epoch=1, shard=0, shards=1)
    meta = msgspec.structs.replace(meta, extra={"log": "x" * INDEX_BYTES_MAX})

    with pytest.raises(UnstorableError, match=r"may have 67108864.*shard 0 of step 1") as caught:
        write_shard(store, seal(LAYOUT, body, meta), body)

    assert "leave it out" in caught.value.hint
    assert store.keys() == []


def test_nothing_writes_into_the_callers_buffer_once_an_error_was_raised() -> None:
    store, (index, body) = FaultyStore(MemoryStore()), large(9 << 20)
    write_shard(store, index, body)
    target = bytearray(b"\x55" * index.size)

    def before(operation: str, key: str) -> None:
        if operation == "get" and key == body_key(100, 2, 0):
            number = next(calls)
            if number == 0:
                raise StorageUnavailableError("gone")
            time.sleep(0.1)

    calls = iter(range(9))
    store.before = before
    with pytest.raises(StorageUnavailableError):
        fetch_body(store, index, target)
    returned = bytes(target)
    time.sleep(0.3)

    assert target == returned
