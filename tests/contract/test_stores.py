"""The contract of `BlobStore`, which every store and every stack of wrappers must keep."""

import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.blob import BlobStore, get_into
from storage.encrypted import EncryptedStore
from storage.errors import BlobExistsError, BlobNotFoundError
from storage.faulty import FaultyStore
from storage.local import LocalStore
from storage.memory import MemoryStore
from storage.wrappers import CountingStore, RetryingStore, ThrottledStore
from tests import buckets

# In memory where the machine has it: these tests are about behaviour, not about the disk.
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108


def never(_seconds: float) -> None:
    raise AssertionError("a store without faults has nothing to wait for")


KEY = bytes(range(32))


def encrypted(inner: BlobStore) -> EncryptedStore:
    # Small blocks, so that the blobs of these tests have several.
    return EncryptedStore(inner, KEY, block_bytes=100)


def quick(inner: BlobStore) -> ThrottledStore:
    return ThrottledStore(inner, 1e12)


def faulty(inner: BlobStore) -> FaultyStore:
    return FaultyStore(inner, sleep=never)


def retrying(inner: BlobStore) -> RetryingStore:
    return RetryingStore(inner, sleep=never)


WRAPPERS: tuple[Callable[[BlobStore], BlobStore], ...] = (
    *(CountingStore, encrypted, faulty, quick, retrying),
)
STACKS: dict[str, Callable[[Path], BlobStore]] = {
    "memory": lambda _: MemoryStore(),
    "local": LocalStore,
    **{
        # Each pair, in both orders.
        f"{outer.__name__} on {inner.__name__}": lambda _, o=outer, i=inner: o(i(MemoryStore()))
        for outer, inner in itertools.permutations(WRAPPERS, 2)
    },
    "all on local": lambda root: CountingStore(
        retrying(encrypted(quick(faulty(LocalStore(root)))))
    ),
}
BUCKETS: dict[str, Callable[[BlobStore], BlobStore]] = {
    "s3": lambda store: store,
    "all on s3": lambda store: CountingStore(retrying(encrypted(quick(faulty(store))))),
}
if os.environ.get(buckets.ANOTHER):
    BUCKETS["another s3"] = lambda store: store


@pytest.fixture(params=[*STACKS, *BUCKETS])
def store(request: pytest.FixtureRequest) -> Iterator[BlobStore]:
    if request.param in BUCKETS:
        other = request.param == "another s3"
        bucket = buckets.another() if other else request.getfixturevalue("s3").store()
        yield BUCKETS[request.param](bucket)
        left = bucket.keys()
        for key in left:
            bucket.delete(key)
        return
    root = Path(tempfile.mkdtemp(dir=SCRATCH))
    yield STACKS[request.param](root / "run")
    shutil.rmtree(root)


def test_a_blob_that_was_put_is_read_back(store: BlobStore) -> None:
    store.put("gen/3f/1-0/s0.st", b"hello")

    assert store.get("gen/3f/1-0/s0.st") == b"hello"
    assert store.size("gen/3f/1-0/s0.st") == 5


@pytest.mark.parametrize(
    "data", [b"", b"x", bytearray(b"abc"), memoryview(b"abcdef")[1:4], bytes(300_000)], ids=len
)
def test_any_buffer_of_any_length_can_be_put(store: BlobStore, data: bytes) -> None:
    store.put("k", data)

    assert store.get("k") == bytes(data)


def test_a_buffer_that_changes_after_put_does_not_change_the_blob(store: BlobStore) -> None:
    data = bytearray(b"before")

    store.put("k", data)
    data[:] = b"after!"

    assert store.get("k") == b"before"


def test_a_second_put_is_refused_and_the_first_content_stays(store: BlobStore) -> None:
    store.put("k", b"first")

    for again in (b"first", b"second"):
        with pytest.raises(BlobExistsError, match="k"):
            store.put("k", again)

    assert store.get("k") == b"first"


@pytest.mark.parametrize(
    ("start", "length"), [(0, None), (0, 3), (2, 3), (2, None), (4, 100), (5, 1), (99, 1), (1, 0)]
)
def test_a_range_is_read_like_a_slice(store: BlobStore, start: int, length: int | None) -> None:
    store.put("k", b"01234")

    expected = b"01234"[start:] if length is None else b"01234"[start : start + length]
    assert store.get("k", start, length) == expected


@pytest.mark.parametrize(("start", "length"), [(-1, None), (0, -1)])
def test_a_negative_range_is_refused(store: BlobStore, start: int, length: int) -> None:
    store.put("k", b"01234")

    with pytest.raises(ValueError, match="0 or more"):
        store.get("k", start, length)


@pytest.mark.parametrize(("start", "length"), [(0, 10), (0, 4), (3, 4), (8, 9), (10, 1), (99, 5)])
def test_memory_of_the_callers_is_filled_like_a_slice(
    store: BlobStore, start: int, length: int
) -> None:
    store.put("a/b", b"0123456789")
    buffer = bytearray(b"." * length)

    read = get_into(store, "a/b", start, memoryview(buffer))

    expected = b"0123456789"[start : start + length]
    assert (read, bytes(buffer)) == (len(expected), expected.ljust(length, b"."))
    with pytest.raises(BlobNotFoundError):
        get_into(store, "a/c", 0, memoryview(buffer))


@pytest.mark.parametrize("key", ["absent", "a/absent", "a", "a/b/c"])
def test_reading_what_is_not_there_says_so(store: BlobStore, key: str) -> None:
    store.put("a/b", b"")

    with pytest.raises(BlobNotFoundError, match=key):
        store.get(key)
    with pytest.raises(BlobNotFoundError, match=key):
        store.size(key)


def test_keys_are_listed_by_prefix_and_sorted(store: BlobStore) -> None:
    for key in ("b/2", "a/10", "a/9", "a-1", "ab", "a/c/d"):
        store.put(key, b"")

    assert store.keys() == ["a-1", "a/10", "a/9", "a/c/d", "ab", "b/2"]
    assert store.keys("a/") == ["a/10", "a/9", "a/c/d"]
    assert store.keys("a/1") == ["a/10"]
    assert store.keys("a") == ["a-1", "a/10", "a/9", "a/c/d", "ab"]
    assert store.keys("absent/") == []


def test_a_deleted_blob_is_gone_and_its_key_is_free(store: BlobStore) -> None:
    store.put("a/b", b"old")

    store.delete("a/b")
    store.delete("a/b")

    assert store.keys() == []
    store.put("a/b", b"new")
    assert store.get("a/b") == b"new"


def test_deleting_a_prefix_of_keys_deletes_nothing(store: BlobStore) -> None:
    store.put("a/b", b"")

    store.delete("a")

    assert store.keys() == ["a/b"]


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "..", "a/../b", ".tmp-1", "a/.b", "a b", "a\n", "é", "a" * 513]
)
def test_a_malformed_key_is_refused_everywhere(store: BlobStore, key: str) -> None:
    for call in (store.get, store.size, store.delete, lambda k: store.put(k, b"")):
        with pytest.raises(ValueError, match="key must be"):
            call(key)


@pytest.mark.parametrize("prefix", ["/", "../", "a//", ".tmp"])
def test_a_malformed_prefix_is_refused(store: BlobStore, prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix must be"):
        store.keys(prefix)


def test_of_many_writers_of_one_key_exactly_one_succeeds(store: BlobStore) -> None:
    won: list[int] = []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        try:
            store.put("k", str(number).encode() * 1000)
        except BlobExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(won) == 1
    assert store.get("k") == str(won[0]).encode() * 1000


def test_writers_and_deleters_of_neighbours_do_not_disturb_each_other(store: BlobStore) -> None:
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                store.put(f"a/b/{number}-{turn}", b"x")
                store.delete(f"a/b/{number}-{turn}")
        except Exception as error:  # noqa: BLE001 - the main thread looks at it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert store.keys() == []
