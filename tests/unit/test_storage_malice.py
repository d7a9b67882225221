"""Files made up by somebody who can write to the store are refused before they cost anything."""

import tracemalloc

import msgspec
import pytest

from storage import commit as committing
from storage import verdicts
from storage.catalog import Catalog
from storage.digest import sha256_hex
from storage.errors import (
    BlobTooLargeError,
    ManifestCorruptError,
    ShardCorruptError,
)
from storage.faulty import FaultyStore
from storage.manifest import (
    MANIFEST_BYTES_MAX,
    ShardReceipt,
    commit_key,
    decode_manifest,
    index_key,
    make_manifest,
    parse_commit_key,
    parse_generation_key,
    parse_verdict_key,
)
from storage.memory import MemoryStore
from storage.shard import INDEX_BYTES_MAX, ShardMeta, decode_index, encode_index, seal
from tests.checkpoints import LAYOUT, committed

META = ShardMeta(run_id="run", model="m", step=10, epoch=1, shard=0, shards=1)
DEEP = (
    b'{"version":1,"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    b'{"version":1,"a":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_001,
    b'{"version":1,"layout":' + b'{"a":' * 200_000,
    b'{"version":1,"extra":{"a":' + b"[" * 200_000,
)


@pytest.mark.parametrize("data", DEEP, ids=range(len(DEEP)))
def test_json_of_any_depth_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestCorruptError):
        decode_manifest(data)
    with pytest.raises(ShardCorruptError):
        decode_index(data)

    store = MemoryStore()
    key = verdicts.add(store, 10, 1, verdicts.SUSPECT, "")
    store.delete(key)
    store.put(key, data)
    assert "unreadable" in verdicts.reason_of(store, key)


@pytest.mark.parametrize("field", ["shape", "offset", "global_shape"])
def test_a_tensor_of_more_dimensions_than_there_are_is_refused_at_once(field: str) -> None:
    index = seal(LAYOUT, bytearray(LAYOUT.size), META)
    wide = msgspec.structs.replace(index.chunks[0], **{field: (2**62,) * 100_000})
    data = encode_index(msgspec.structs.replace(index, chunks=(wide, *index.chunks[1:])))

    with pytest.raises(ShardCorruptError, match="100000 dimensions, may have 64") as refused:
        decode_index(data)

    assert len(str(refused.value)) < 200


class Endless(MemoryStore):
    """Has a file behind one key that is as long as one asks for, and notes how much that was."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.asked: int | None = 0

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if key != self.key:
            return super().get(key, start, length)
        self.asked = length
        assert length is not None, "the whole file was asked for, whatever its size"
        return bytes(length)


@pytest.mark.parametrize(
    ("key", "limit"),
    [(commit_key(10, 1), MANIFEST_BYTES_MAX), (index_key(10, 1, 0), INDEX_BYTES_MAX)],
    ids=["record", "index"],
)
def test_a_file_that_is_too_large_for_its_kind_is_not_read_to_its_end(key: str, limit: int) -> None:
    store = Endless(key)
    manifest = committed(store, 10)

    if key.startswith("commits/"):
        (record,) = Catalog(store).commits()
        assert "blob has more than" in record.fault
    else:
        with pytest.raises(BlobTooLargeError):
            committing.fetch_index(store, manifest, 0)

    assert store.asked == limit + 1


def test_an_index_that_claims_an_absurd_size_takes_no_memory() -> None:
    store = MemoryStore()
    manifest = committed(store, 10)
    index = committing.fetch_index(store, manifest, 0)
    claimed = encode_index(index).replace(b'"size":', b'"size":99999')
    with pytest.raises(ShardCorruptError):
        decode_index(claimed)

    # Consistent in itself, and vouched for by a record: a body of almost a TiB.
    huge = encode_index(index).replace(b"[64]", b"[1099511620000]")
    tracemalloc.start()
    with pytest.raises(ShardCorruptError):
        decode_index(huge)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_body_of_another_size_than_its_index_says_takes_no_memory() -> None:
    store = FaultyStore(MemoryStore())
    manifest = committed(store, 10)
    store.truncated = {key: 50 for key in store.keys("gen/") if key.endswith(".st")}

    with pytest.raises(ShardCorruptError, match="body has 50 bytes"):
        committing.fetch_shard(store, manifest, 0)


@pytest.mark.parametrize(
    "key",
    [
        "commits/9999999999999999-1.json",
        "commits/8999999999999990-" + "9" * 5000 + ".json",
        "commits/../../etc/passwd-1.json",
        "gen/00/../../10-1/s0.st",
        "gen/00/" + "9" * 400 + "-1/s0.st",
        "verdicts/10-1/000000-../x.json",
        "verdicts/10-" + "1" * 400 + "/000000-suspect.json",
    ],
)
def test_a_key_that_nobody_makes_is_nobodys(key: str) -> None:
    for parse in (parse_commit_key, parse_generation_key, parse_verdict_key):
        assert parse(key) is None


def test_a_record_with_a_shard_of_an_impossible_number_is_refused() -> None:
    receipt = ShardReceipt(shard=5, size=1, index_digest=sha256_hex(b""))

    with pytest.raises(ValueError, match="missing"):
        make_manifest([receipt], run_id="r", model="m", step=1, epoch=1)
