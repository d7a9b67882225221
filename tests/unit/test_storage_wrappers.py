"""Each wrapper's own concern."""

import pytest

from storage.errors import (
    BlobExistsError,
    BlobNotFoundError,
    StorageFullError,
    StorageUnavailableError,
)
from storage.memory import MemoryStore
from storage.wrappers import CountingStore, FaultyStore, RetryingStore


def test_calls_and_bytes_are_counted() -> None:
    store = CountingStore(MemoryStore())

    store.put("k", b"12345")
    store.get("k", 1, 2)
    with pytest.raises(BlobNotFoundError):
        store.get("absent")
    store.size("k")
    store.keys()
    store.delete("k")

    assert (store.puts, store.gets, store.sizes, store.lists, store.deletes) == (1, 2, 1, 1, 1)
    assert (store.bytes_put, store.bytes_got) == (5, 2)


def test_a_full_store_refuses_puts_until_there_is_room_and_serves_reads() -> None:
    store = FaultyStore(MemoryStore())
    store.put("old", b"x")

    store.full = True
    with pytest.raises(StorageFullError):
        store.put("new", b"x")
    assert store.get("old") == b"x"
    store.full = False

    store.put("new", b"x")


def test_a_slow_store_waits_before_every_operation() -> None:
    waits: list[float] = []
    store = FaultyStore(MemoryStore(), sleep=waits.append, slow_s=2.5)

    store.put("k", b"")
    store.get("k")

    assert waits == [2.5, 2.5]


def test_a_torn_write_leaves_a_prefix_and_no_confirmation_once() -> None:
    store = FaultyStore(MemoryStore(), tear_at=2)

    with pytest.raises(StorageUnavailableError, match="after 2 bytes"):
        store.put("k", b"12345")
    store.put("other", b"12345")

    assert store.get("k") == b"12"
    assert store.get("other") == b"12345"


@pytest.mark.parametrize(("start", "length", "expected"), [(0, None, b"\0\2"), (1, 1, b"\2")])
def test_a_flipped_bit_shows_in_every_read_that_covers_it(
    start: int, length: int | None, expected: bytes
) -> None:
    store = FaultyStore(MemoryStore(), flips={"k": 9})
    store.put("k", b"\0\0")

    assert store.get("k", start, length) == expected
    assert store.get("k", 0, 1) == b"\0"


def test_a_store_that_comes_back_is_waited_for_longer_each_time() -> None:
    faulty = FaultyStore(MemoryStore(), down=True)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        faulty.down = len(waits) < 3

    store = RetryingStore(faulty, wait_s=0.5, sleep=sleep)

    store.put("k", b"x")
    assert waits == [0.5, 1.0, 2.0]
    assert store.get("k") == b"x"


def test_a_store_that_stays_away_is_given_up_after_the_bound() -> None:
    waits: list[float] = []
    store = RetryingStore(FaultyStore(MemoryStore(), down=True), attempts_max=3, sleep=waits.append)

    with pytest.raises(StorageUnavailableError):
        store.keys()

    assert len(waits) == 2


def test_what_cannot_succeed_later_is_not_repeated() -> None:
    counting = CountingStore(MemoryStore())
    store = RetryingStore(counting)
    store.put("k", b"x")

    with pytest.raises(BlobExistsError):
        store.put("k", b"x")
    with pytest.raises(BlobNotFoundError):
        store.get("absent")

    assert (counting.puts, counting.gets) == (2, 1)


def test_a_put_whose_confirmation_was_lost_succeeds() -> None:
    faulty = FaultyStore(MemoryStore(), lose_confirmation=True)
    store = RetryingStore(faulty, sleep=lambda _: None)

    store.put("k", b"x")

    assert store.get("k") == b"x"


def test_a_put_that_was_torn_is_not_taken_for_a_success() -> None:
    store = RetryingStore(FaultyStore(MemoryStore(), tear_at=1), sleep=lambda _: None)

    with pytest.raises(BlobExistsError):
        store.put("k", b"xyz")
