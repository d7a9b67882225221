"""Asking a store many things at once: the same answers, sooner."""

import threading
import time
from contextlib import closing

import pytest

from storage.catalog import Catalog
from storage.errors import StorageUnavailableError
from storage.faulty import FaultyStore
from storage.manifest import commit_key, encode_manifest
from storage.memory import MemoryStore
from storage.parallel import FEW, ahead, each
from tests.checkpoints import committed, written


def test_answers_come_in_the_order_of_the_questions() -> None:
    def slowly(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        return number * number

    assert each(slowly, range(100)) == [number * number for number in range(100)]
    assert each(slowly, []) == []


def test_a_few_are_asked_one_after_the_other_by_whoever_asks() -> None:
    names = each(lambda _: threading.current_thread().name, range(FEW))

    assert set(names) == {threading.current_thread().name}


def test_what_the_first_one_raised_is_raised_even_a_kill() -> None:
    def fail(number: int) -> None:
        if number >= 40:
            raise KeyboardInterrupt(number)

    with pytest.raises(KeyboardInterrupt) as raised:
        each(fail, range(50), at_once=1)

    assert raised.value.args == (40,)


def test_a_thousand_checkpoints_are_listed_and_one_is_chosen_in_a_second_of_20_ms_answers() -> None:
    inner = MemoryStore()
    for step in range(1000):
        # Not by `commit`, which looks through all that there are.
        inner.put(commit_key(step, 1), encode_manifest(written(inner, step)))
    store = FaultyStore(inner, slow_s=0.02)
    begun = time.monotonic()

    found, _ = Catalog(store).newest_verified()
    chosen_s = time.monotonic() - begun
    records = Catalog(store).commits()
    listed_s = time.monotonic() - begun - chosen_s

    assert found is not None
    assert found.step == 999
    assert len(records) == 1000
    # One after the other it would take 20 s. The target is 1 s on a machine that does nothing else.
    assert chosen_s < 2
    assert listed_s < 5


def test_a_store_that_does_not_answer_fails_the_whole_list() -> None:
    store = FaultyStore(MemoryStore())
    for step in range(20):
        committed(store, step)
    store.before = lambda _operation, key: setattr(store, "down", "0-1.json" in key)

    with pytest.raises(StorageUnavailableError):
        Catalog(store).commits()


def test_what_is_read_ahead_comes_in_order_and_no_more_than_that_is_under_way() -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    def read(number: int) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.002)
        with lock:
            under_way -= 1
        return number

    assert list(ahead(read, range(30), 4)) == list(range(30))
    assert 2 <= most <= 4
    assert list(ahead(read, [], 4)) == []


def test_what_a_call_raised_comes_when_its_turn_does() -> None:
    def read(number: int) -> int:
        if number == 2:
            raise StorageUnavailableError("gone")
        return number

    reading = ahead(read, range(9), 4)

    assert [next(reading), next(reading)] == [0, 1]
    with pytest.raises(StorageUnavailableError, match="gone"):
        next(reading)


def test_whoever_stops_early_waits_for_the_calls_under_way_if_they_are_to_be_joined() -> None:
    begun, ended = threading.Semaphore(0), []

    def read(number: int) -> int:
        if number == 0:
            for _ in range(3):
                begun.acquire()
            raise StorageUnavailableError("gone")
        begun.release()
        time.sleep(0.05)
        ended.append(number)
        return number

    with (
        pytest.raises(StorageUnavailableError),
        closing(ahead(read, range(9), 4, joined=True)) as reading,
    ):
        next(reading)

    assert sorted(ended) == [1, 2, 3]
