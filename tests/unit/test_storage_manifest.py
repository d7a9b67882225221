"""The commit record: small at any number of shards, and in agreement with itself."""

import hashlib

import msgspec
import pytest

from storage.digest import sha256_hex
from storage.errors import ManifestCorruptError, UnsupportedVersionError
from storage.manifest import (
    Manifest,
    ShardReceipt,
    decode_manifest,
    encode_manifest,
    make_manifest,
)

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
    false = msgspec.structs.replace(false, root=sha256_hex(false.index_digests), checksum="")
    return encode_manifest(
        msgspec.structs.replace(false, checksum=sha256_hex(encode_manifest(false)))
    )


@pytest.mark.parametrize(
    "sizes",
    [[346_000_000] * MANY, [346_000_000 + shard for shard in range(MANY)]],
    ids=["of one size", "of a size each"],
)
def test_a_record_of_16384_shards_has_less_than_a_megabyte(sizes: list[int]) -> None:
    data = encode_manifest(record(sizes))

    assert len(data) < 1_000_000
    assert list(decode_manifest(data).receipts()) == receipts(sizes)


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


def test_a_record_of_the_older_version_is_refused_as_such() -> None:
    with pytest.raises(UnsupportedVersionError, match="version 1, known is 2"):
        decode_manifest(lying(version=1))


@pytest.mark.parametrize("digest", ["", "00" * 31, "z" * 64])
def test_what_is_no_digest_makes_no_record(digest: str) -> None:
    bad = ShardReceipt(shard=0, size=1, index_digest=digest)

    with pytest.raises(ValueError, match=r"SHA-256|hex"):
        make_manifest([bad], run_id="r", model="m", step=1, epoch=0)
