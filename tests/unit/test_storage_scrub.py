"""Reading back: every damage is named, with its file, its chunk, what was expected and found."""

import pytest

from storage.catalog import Catalog
from storage.encrypted import EncryptedStore
from storage.errors import StorageRefusedError, StorageUnavailableError
from storage.faulty import FaultyStore
from storage.manifest import body_key, commit_key, digests_key, index_key
from storage.memory import MemoryStore
from storage.scrub import HEADER, Damage, Examined, examine, scrub_all
from storage.verdicts import Trust, standing_of
from tests.checkpoints import LAYOUT, committed, in_groups


def test_a_whole_checkpoint_has_no_damages_and_every_byte_was_read() -> None:
    store = MemoryStore()
    manifest = committed(store, 10)
    read: list[int] = []

    assert examine(store, manifest, read=read.append) == []
    assert sum(read) == 2 * LAYOUT.size


def test_every_chunk_that_is_damaged_is_named_not_only_the_first() -> None:
    store = FaultyStore(MemoryStore())
    manifest = committed(store, 10)
    (start, _), (second, _) = LAYOUT.spans
    key = body_key(10, 1, 1)
    data = bytearray(store.get(key))
    data[start] ^= 1
    data[second] ^= 1
    store.delete(key)
    store.put(key, data)

    damages = examine(store, manifest)

    assert [(damage.key, damage.chunk) for damage in damages] == [
        (key, "param/v"),
        (key, "param/w"),
    ]
    for damage in damages:
        assert damage.expected.startswith("xxh3-128 ")
        assert damage.found.startswith("xxh3-128 ")
        assert damage.expected != damage.found
        assert str(damage).startswith("expected xxh3-128 ")


@pytest.mark.parametrize("flipped", [True, False])
def test_without_the_digests_of_all_indexes_nothing_is_verified_and_that_file_is_named(
    *, flipped: bool
) -> None:
    inner = MemoryStore()
    with in_groups():
        committed(inner, 10)
        committed(inner, 20)
    key = digests_key(20, 1)
    store = FaultyStore(inner, flips={key: 9} if flipped else {})
    if not flipped:
        inner.delete(key)
    catalog = Catalog(store)

    twenty, ten = scrub_all(catalog)

    assert ten.damages == ()
    (damage,) = twenty.damages
    assert (damage.key, damage.expected) == (key, "the digests of all indexes")
    assert damage.found == (f"64 of 64 bytes, or others: {key}" if flipped else "nothing")
    newest, (rejected,) = catalog.newest_verified()
    assert newest is not None
    assert (newest.step, rejected.step) == (10, 20)


def test_what_computed_right_was_not_read_back_for_that() -> None:
    store = MemoryStore()
    committed(store, 10)
    Catalog(store).judge(10, 1, Trust.COMPUTE_VERIFIED.kind, "replayed")

    assert [one.step for one in scrub_all(Catalog(store))] == [10]
    assert list(scrub_all(Catalog(store))) == []


BODY, INDEX = body_key(10, 1, 0), index_key(10, 1, 0)


@pytest.mark.parametrize(
    ("flips", "truncated", "key", "chunk", "found"),
    [
        ({BODY: 8}, {}, BODY, HEADER, "crc32c"),
        ({}, {BODY: 100}, BODY, "", "100 bytes"),
        ({INDEX: 999}, {}, INDEX, "", "sha-256"),
        ({}, {INDEX: 7}, INDEX, "", "sha-256"),
    ],
)
def test_each_kind_of_damage_names_its_file(
    flips: dict[str, int], truncated: dict[str, int], key: str, chunk: str, found: str
) -> None:
    store = FaultyStore(MemoryStore(), flips=flips, truncated=truncated)
    manifest = committed(store, 10)

    (damage,) = examine(store, manifest)

    assert (damage.key, damage.chunk) == (key, chunk)
    assert found in damage.found


@pytest.mark.parametrize("key_of", [body_key, index_key])
def test_a_file_that_is_gone_is_named(key_of: object) -> None:
    store = MemoryStore()
    manifest = committed(store, 10)
    key = key_of(10, 1, 1)  # type: ignore[operator]
    store.delete(key)

    (damage,) = examine(store, manifest)

    assert (damage.key, damage.found) == (key, "nothing")


def test_a_store_that_does_not_answer_says_nothing_of_the_bytes() -> None:
    store = FaultyStore(MemoryStore())
    manifest = committed(store, 10)
    store.down = True

    with pytest.raises(StorageUnavailableError):
        examine(store, manifest)


def test_a_scrub_verifies_what_is_whole_and_suspects_what_is_not_once() -> None:
    store = FaultyStore(MemoryStore())
    for step in (10, 20, 30):
        committed(store, step)
    store.flips[body_key(20, 1, 0)] = LAYOUT.spans[0][0] * 8
    store.flips[commit_key(10, 1)] = 800
    catalog = Catalog(store)

    done = list(scrub_all(catalog))

    assert [(one.step, bool(one.damages), bool(one.fault)) for one in done] == [
        (30, False, False),
        (20, True, False),
        (10, False, True),
    ]
    assert standing_of(store, 30, 1).trust is Trust.BYTES_VERIFIED
    assert standing_of(store, 20, 1).kind == "suspect"
    found, rejections = catalog.newest_trusted(before_step=30)
    assert found is None
    assert "scrub found expected xxh3-128" in rejections[0].reason
    # What is on record is not read again, unless it is asked for.
    assert [one.step for one in scrub_all(catalog)] == [10]
    assert [one.step for one in scrub_all(catalog, again=True)] == [30, 10]


def test_what_is_deleted_while_it_is_read_is_not_suspected() -> None:
    store = FaultyStore(MemoryStore())
    for step in (10, 20):
        committed(store, step)

    def collect(operation: str, key: str) -> None:
        if operation == "get" and key == index_key(10, 1, 1):
            for gone in (commit_key(10, 1), body_key(10, 1, 1), index_key(10, 1, 1)):
                store.inner.delete(gone)

    store.before = collect

    assert [one.step for one in scrub_all(Catalog(store))] == [20]
    assert standing_of(store, 10, 1).keys == ()


def test_a_damage_can_be_told_on_one_line() -> None:
    damage = Damage(key="gen/a", chunk="", expected="5 bytes", found="nothing")

    assert str(damage) == "expected 5 bytes, found nothing: gen/a"
    assert Examined(step=1, epoch=1, damages=(damage,)).fault == ""


@pytest.mark.parametrize("key_of", [body_key, index_key])
def test_who_may_not_read_a_file_makes_nothing_suspect(key_of: object) -> None:
    store = FaultyStore(MemoryStore())
    committed(store, 10)
    store.refused.add(key_of(10, 1, 1))  # type: ignore[operator]

    with pytest.raises(StorageRefusedError, match="Permission denied"):
        list(scrub_all(Catalog(store)))
    assert standing_of(store, 10, 1).keys == ()


def test_a_bit_that_flipped_in_the_name_of_a_blobs_key_is_damage() -> None:
    inner = FaultyStore(MemoryStore(), flips={BODY: 8 * 8})
    store = EncryptedStore(inner, bytes(32))

    (damage,) = examine(store, committed(store, 10))

    assert damage.key == BODY
    assert "encrypted with key" in damage.found
