"""Each wrapper's own concern."""

import queue
import threading
from typing import Any

import pytest

from storage.digest import BLOCK_BYTES, Buffer
from storage.errors import (
    BlobExistsError,
    BlobNotFoundError,
    StorageFullError,
    StorageUnavailableError,
)
from storage.faulty import FaultyStore
from storage.memory import MemoryStore
from storage.wrappers import CountingStore, RetryingStore, ThrottledStore

THREADS = 8


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


def test_what_a_busy_store_answered_is_asked_again_and_what_is_taken_is_not() -> None:
    faulty = FaultyStore(MemoryStore(), busy=2, conflicts=1)
    counting = CountingStore(faulty)
    store = RetryingStore(counting, sleep=lambda _: None)

    store.put("k", b"x")
    assert counting.puts == 4

    faulty.taken = 1
    with pytest.raises(BlobExistsError, match="412"):
        store.put("other", b"x")
    assert counting.puts == 5
    assert store.keys() == ["k"]


def test_a_large_put_whose_confirmation_was_lost_is_compared_block_by_block() -> None:
    faulty = FaultyStore(MemoryStore(), lose_confirmation=True)
    counting = CountingStore(faulty)
    data = bytes(range(256)) * (BLOCK_BYTES // 256) + b"end"

    RetryingStore(counting, sleep=lambda _: None).put("k", data)

    assert (counting.puts, counting.gets, counting.bytes_got) == (2, 2, len(data))


def test_writes_that_show_late_are_not_there_until_the_store_settles() -> None:
    store = FaultyStore(MemoryStore(), late=lambda key: key.startswith("a"))

    for key in ("a", "b"):
        store.put(key, b"x")

    assert store.keys() == ["b"]
    for look in (store.get, store.size):
        with pytest.raises(BlobNotFoundError):
            look("a")
    with pytest.raises(BlobExistsError):
        store.put("a", b"y")
    store.settle()
    assert store.keys() == ["a", "b"]
    assert store.get("a") == b"x"


@pytest.mark.parametrize(
    ("start", "length", "expected"), [(0, None, b"01"), (1, 3, b"1"), (2, 1, b""), (3, None, b"")]
)
def test_a_truncated_blob_ends_early_for_every_reader(
    start: int, length: int | None, expected: bytes
) -> None:
    store = FaultyStore(MemoryStore(), truncated={"k": 2})
    store.put("k", b"01234")

    assert store.get("k", start, length) == expected
    assert store.size("k") == 2


def test_bytes_move_at_the_rate_that_is_asked_for_and_idle_time_is_not_saved_up() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    store = ThrottledStore(MemoryStore(), 100.0, clock=lambda: now, sleep=sleep)

    store.put("k", bytes(50))
    store.get("k", 0, 20)
    assert now == pytest.approx(0.5)
    store.keys()
    assert now == pytest.approx(0.7)

    now = 100.0
    for _ in range(3):
        store.get("k")
    assert now == pytest.approx(101.0)


class Together(MemoryStore):
    """Has nobody go on with a blob before so many have come for one."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.barrier = threading.Barrier(threads, timeout=20.0)

    def put(self, key: str, data: Buffer) -> None:
        self.barrier.wait()
        super().put(key, data)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self.barrier.wait()
        return super().get(key, start, length)


@pytest.mark.parametrize(
    "length", ["put", None, 50, BLOCK_BYTES + 1], ids=["put", "all", "a part", "all there is"]
)
def test_threads_that_come_at_once_go_one_after_the_other_at_the_rate(length: Any) -> None:
    """Each waits for a moment of its own: none finds the way free because all are still reading."""
    inner, waits = Together(THREADS), queue.SimpleQueue[float]()
    MemoryStore.put(inner, "k", bytes(50))
    store = ThrottledStore(inner, 100.0, clock=lambda: 0.0, sleep=waits.put)

    def move(number: int) -> None:
        if length == "put":
            store.put(f"new-{number}", bytes(50))
        else:
            store.get("k", 0, length)

    threads = [threading.Thread(target=move, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    # 50 bytes at 100 a second; the first need not wait.
    assert sorted(waits.get() for _ in range(waits.qsize())) == [0.5 * n for n in range(1, THREADS)]


def test_what_was_booked_and_is_not_there_is_given_back() -> None:
    waits: list[float] = []
    store = ThrottledStore(MemoryStore(), 100.0, clock=lambda: 0.0, sleep=waits.append)
    store.put("k", bytes(50))

    assert len(store.get("k", 40, 1000)) == 10
    with pytest.raises(BlobNotFoundError):
        store.get("absent", 0, 1000)
    store.keys()

    assert waits == pytest.approx([0.5, 0.6, 0.6])


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        ThrottledStore(MemoryStore(), 0.0)
