"""The commit record: small at any number of shards, and in agreement with itself."""

import hashlib
from collections.abc import Callable

import msgspec
import pytest

from storage.commit import completed, promised
from storage.digest import sha256_hex
from storage.errors import (
    BlobNotFoundError,
    BlobTooLargeError,
    ManifestCorruptError,
    ShardCorruptError,
    UnsupportedVersionError,
)
from storage.manifest import (
    GROUPS_MAX,
    Manifest,
    ShardReceipt,
    decode_manifest,
    digests_key,
    encode_manifest,
    make_manifest,
)
from storage.memory import MemoryStore
from storage.wrappers import CountingStore
from tests.checkpoints import in_groups

MANY = 16_384


def receipts(sizes: list[int]) -> list[ShardReceipt]:
    return [
        ShardReceipt(shard=shard, size=size, index_digest=sha256_hex(str(shard).encode()))
        for shard, size in enumerate(sizes)
    ]


def record(sizes: list[int]) -> Manifest:
    return make_manifest(receipts(sizes), run_id="run", model="m", step=10, epoch=1)


def lying(**changes: object) -> bytes:
    """Return a record that contradicts itself, with a checksum and a root that fit it."""
    false = msgspec.structs.replace(record([5, 5, 7]), **changes)
    root = sha256_hex(false.group_digests or false.index_digests)
    false = msgspec.structs.replace(false, root=root, checksum="")
    return encode_manifest(
        msgspec.structs.replace(false, checksum=sha256_hex(encode_manifest(false)))
    )


@pytest.mark.parametrize(
    ("sizes", "bytes_max"),
    [
        ([346_000_000] * MANY, 100_000),
        ([346_000_000 + shard % 512 // 500 for shard in range(MANY)], 100_000),
        ([346_000_000 + shard for shard in range(MANY)], 400_000),
    ],
    ids=["of one size", "of two sizes", "of a size each"],
)
def test_a_record_of_16384_shards_has_100_kilobytes_or_what_their_sizes_take(
    sizes: list[int], bytes_max: int
) -> None:
    made = record(sizes)
    data = encode_manifest(made)
    store = MemoryStore()
    store.put(digests_key(10, 1), made.index_digests)

    assert len(data) < bytes_max
    read = decode_manifest(data)
    assert (read.size, list(read.shard_sizes())) == (sum(sizes), sizes)
    assert completed(store, read) == made
    assert list(completed(store, read).receipts()) == receipts(sizes)
    few = CountingStore(store)
    assert promised(few, read, 16_000) == receipts(sizes)[16_000]
    assert few.gets == 1


@pytest.mark.parametrize("count", [1, 2047, 2048])
def test_a_record_of_no_more_than_2048_shards_has_the_digest_of_each(count: int) -> None:
    made = record([5] * count)

    assert decode_manifest(encode_manifest(made)) == made
    assert (made.version, made.grouped, len(made.index_digests)) == (2, False, 32 * count)


@pytest.mark.parametrize("count", [2049, 4096, 4097, 5000])
def test_the_last_group_may_have_fewer_shards(count: int) -> None:
    made = record([5] * count)
    store = MemoryStore()
    store.put(digests_key(10, 1), made.index_digests)

    read = decode_manifest(encode_manifest(made))

    assert len(read.group_digests) <= 32 * GROUPS_MAX
    for shard in (0, 1, count // 2, count - 2, count - 1):
        assert promised(store, read, shard) == receipts([5] * count)[shard]
    with pytest.raises(ValueError, match=f"shard is {count}"):
        promised(store, read, count)


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-1], lambda data: data + b" ", lambda _: b"", lambda data: data[32:]],
    ids=["cut short", "grown", "empty", "moved"],
)
def test_other_digests_than_were_committed_are_refused(change: Callable[[bytes], bytes]) -> None:
    made = record([5] * 4097)
    read = decode_manifest(encode_manifest(made))
    store = MemoryStore()
    store.put(digests_key(10, 1), change(made.index_digests))

    with pytest.raises((ShardCorruptError, BlobTooLargeError), match="digests"):
        completed(store, read)
    if len(change(made.index_digests)) < len(made.index_digests):
        with pytest.raises(ShardCorruptError, match="manifest says"):
            promised(store, read, 4096)
    with pytest.raises(BlobNotFoundError):
        promised(MemoryStore(), read, 0)


def test_each_receipt_is_the_one_that_was_given_in_whatever_order() -> None:
    given = receipts([5, 5, 7, 5, 0, 0])

    manifest = make_manifest(given[::-1], run_id="run", model="m", step=10, epoch=1)

    assert [manifest.receipt(shard) for shard in range(6)] == given == list(manifest.receipts())
    assert manifest.size == 22


def test_the_root_is_of_the_digests_as_bytes() -> None:
    digests = b"".join(bytes.fromhex(one.index_digest) for one in receipts([5, 7]))

    assert record([5, 7]).root == hashlib.sha256(digests).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": 4},
        {"shards": 10**18, "sizes": ((10**18, 5),)},
        {"sizes": ((1, 5), (1, 5), (1, 7))},
        {"sizes": ((2, 5), (0, 6), (1, 7))},
        {"sizes": ((4, 5), (-1, 7))},
        {"sizes": ((2, 5), (1, -7))},
        {"index_digests": bytes(95)},
        {"shards": 0, "sizes": (), "index_digests": b""},
    ],
    ids=str,
)
def test_a_record_that_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ManifestCorruptError, match="contradicts itself"):
        decode_manifest(lying(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": 10**18, "sizes": ((10**18, 5),)},
        {"shards": 10**18, "sizes": ((10**18, 5),), "per_group": 10**18},
        {"per_group": 0},
        {"per_group": -3},
        {"per_group": 1},
        {"per_group": 4},
        {"group_digests": bytes(95)},
        {"group_digests": b""},
        {"version": 2},
    ],
    ids=str,
)
def test_a_record_of_groups_that_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    with in_groups():
        told = {"per_group": 3, "group_digests": bytes(32), "version": 3, **changes}
        data = lying(**{"index_digests": b"", **told})

    with pytest.raises(ManifestCorruptError, match="contradicts itself"):
        decode_manifest(data)


def test_a_record_of_the_older_version_is_refused_as_such() -> None:
    with pytest.raises(UnsupportedVersionError, match="version 1, known are 2 and 3"):
        decode_manifest(lying(version=1))


@pytest.mark.parametrize("digest", ["", "00" * 31, "z" * 64])
def test_what_is_no_digest_makes_no_record(digest: str) -> None:
    bad = ShardReceipt(shard=0, size=1, index_digest=digest)

    with pytest.raises(ValueError, match=r"SHA-256|hex"):
        make_manifest([bad], run_id="r", model="m", step=1, epoch=0)
