"""What the contract cannot see of encryption: that it hides, and that no change goes unnoticed."""

import pytest

from storage.encrypted import HEADER_BYTES, TAG_BYTES, EncryptedStore
from storage.errors import BlobCorruptError, StorageError, StorageRefusedError
from storage.faulty import FaultyStore
from storage.memory import MemoryStore
from storage.wrappers import CountingStore

KEY = bytes(range(32))
BLOCK = 16
PLAIN = bytes(range(40))


def over(inner: MemoryStore | FaultyStore | CountingStore, key: bytes = KEY) -> EncryptedStore:
    return EncryptedStore(inner, key, block_bytes=BLOCK)


def test_neither_bytes_nor_repetitions_show_and_the_size_does() -> None:
    inner = MemoryStore()
    store = over(inner)

    for key in ("a", "b"):
        store.put(key, PLAIN)

    first, second = inner.get("a"), inner.get("b")
    assert not any(PLAIN[at : at + 4] in first for at in range(0, 36, 4))
    assert first[HEADER_BYTES:] != second[HEADER_BYTES:]
    assert len(first) == HEADER_BYTES + 3 * TAG_BYTES + len(PLAIN)


def test_every_bit_of_a_blob_that_is_flipped_is_noticed() -> None:
    inner = MemoryStore()
    over(inner).put("k", PLAIN)

    for bit in range(inner.size("k") * 8):
        with pytest.raises(StorageError, match="k"):
            over(FaultyStore(inner, flips={"k": bit})).get("k")


def test_every_length_that_a_blob_is_cut_to_is_noticed() -> None:
    """Also at the edge of a block, where each block that is left has its tag."""
    inner = MemoryStore()
    over(inner).put("k", PLAIN)

    for length in range(inner.size("k")):
        with pytest.raises(BlobCorruptError, match="k"):
            over(FaultyStore(inner, truncated={"k": length})).get("k")


def test_a_blob_and_a_block_of_another_name_or_place_are_refused() -> None:
    inner = MemoryStore()
    store = over(inner)
    store.put("a", PLAIN)
    stride = BLOCK + TAG_BYTES
    blob = inner.get("a")
    head, blocks = blob[:HEADER_BYTES], blob[HEADER_BYTES:]
    inner.put("b", blob)
    inner.put("c", head + blocks[stride : 2 * stride] + blocks[:stride] + blocks[2 * stride :])

    for key in ("b", "c"):
        with pytest.raises(BlobCorruptError, match="does not have its tag"):
            store.get(key)


def test_another_key_is_told_apart_from_damage() -> None:
    inner = MemoryStore()
    over(inner).put("k", PLAIN)

    with pytest.raises(StorageRefusedError, match="encrypted with key"):
        over(inner, bytes(32)).get("k")


def test_what_was_stored_without_encryption_is_told() -> None:
    inner = MemoryStore()
    inner.put("k", bytes(100))

    with pytest.raises(BlobCorruptError, match="not that of an encrypted blob"):
        over(inner).get("k")


def test_a_range_costs_the_blocks_that_it_touches() -> None:
    inner = CountingStore(MemoryStore())
    store = over(inner)
    store.put("k", PLAIN)

    assert store.get("k", 17, 14) == PLAIN[17:31]

    assert inner.bytes_got == HEADER_BYTES + BLOCK + TAG_BYTES


@pytest.mark.parametrize(("key", "block"), [(b"short", 16), (KEY, 0)])
def test_a_key_or_a_block_of_no_use_is_refused(key: bytes, block: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        EncryptedStore(MemoryStore(), key, block_bytes=block)
