"""What is written of a generation that is not to be is taken back, and only what is one's own."""

import itertools
from collections.abc import Callable, Iterator

import pytest

from storage import claim, verdicts
from storage.blob import BlobStore
from storage.claim import Claimed
from storage.errors import (
    StaleEpochError,
    StorageError,
    StorageFullError,
    StorageRefusedError,
    StorageUnavailableError,
)
from storage.faulty import FaultyStore
from storage.manifest import GENERATIONS, body_key, commit_key
from storage.memory import MemoryStore
from tests.checkpoints import brought_in, committed, steps_of


def test_a_generation_that_is_broken_off_goes_again() -> None:
    store = MemoryStore()
    committed(store, 10)
    before = store.keys()

    for stopped_at in range(4):
        puts = itertools.count()

        def interrupt(
            operation: str, _key: str, *, puts: Iterator[int] = puts, last: int = stopped_at
        ) -> None:
            if operation == "put" and next(puts) == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            brought_in(FaultyStore(store, before=interrupt), 20)
        assert store.keys() == before


def test_who_finds_a_blob_there_writes_nothing_and_takes_nothing_back() -> None:
    store, said = MemoryStore(), list[str]()
    first, second = Claimed(store, 20, 2), Claimed(store, 20, 2)
    first.put(body_key(20, 2, 0), b"same")

    def write() -> None:
        second.put(body_key(20, 2, 0), b"same")

    with pytest.raises(StaleEpochError, match="somebody else writes epoch 2"):
        second.unless_written(write, said.append)

    assert store.keys() == [body_key(20, 2, 0)]
    assert said == []


def test_what_can_not_be_taken_back_is_told() -> None:
    def refuse(operation: str, _key: str) -> None:
        if operation == "delete":
            raise StorageRefusedError("may not delete")

    def write() -> None:
        writer.put(body_key(20, 2, 0), b"x")
        raise StorageFullError("no room")

    said = list[str]()
    writer = Claimed(FaultyStore(MemoryStore(), before=refuse), 20, 2)

    with pytest.raises(StorageFullError):
        writer.unless_written(write, said.append)

    assert "written of step 20, epoch 2, stays" in said[0]
    assert "(may not delete)" in said[0]


def test_a_store_that_hangs_keeps_nobody_from_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "UNDO_S", 0.05)
    slow, said = FaultyStore(MemoryStore()), list[str]()
    writer = Claimed(slow, 20, 2)

    def write() -> None:
        writer.put(body_key(20, 2, 0), b"x")
        slow.slow_s = 5.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.unless_written(write, said.append)

    assert "stays until a collection after the next commit (TimeoutError)" in said[0]


def test_a_first_put_that_was_broken_off_is_left_since_it_may_be_anothers() -> None:
    store, said = MemoryStore(), list[str]()
    store.put(body_key(20, 2, 0), b"another's")

    def interrupt(operation: str, _key: str) -> None:
        if operation == "put":
            raise KeyboardInterrupt

    writer = Claimed(FaultyStore(store, before=interrupt), 20, 2)
    with pytest.raises(KeyboardInterrupt):
        writer.unless_written(lambda: writer.put(body_key(20, 2, 0), b"mine"), said.append)

    assert store.get(body_key(20, 2, 0)) == b"another's"
    assert "may be another's" in said[0]


def _full(store: BlobStore, key: str) -> None:
    del store
    raise StorageFullError(f"no room: {key}")


def _overtaken(store: BlobStore, key: str) -> None:
    del key
    verdicts.add(store, 1, 9, verdicts.SUSPECT, "")


def _done_and_silent(store: BlobStore, key: str) -> None:
    del store
    raise StorageUnavailableError(f"no answer: {key}")


@pytest.mark.parametrize(
    ("happens", "error", "stays"),
    [
        (_full, StorageFullError, False),
        (_overtaken, StaleEpochError, False),
        (_done_and_silent, StorageUnavailableError, True),
    ],
)
def test_shards_go_with_a_commit_that_was_refused_and_stay_with_one_that_may_have_been_done(
    happens: Callable[[BlobStore, str], None], error: type[StorageError], *, stays: bool
) -> None:
    store = MemoryStore()

    def before(operation: str, key: str) -> None:
        if operation == "put" and key == commit_key(20, 1):
            happens(store, key)

    with pytest.raises(error):
        brought_in(FaultyStore(store, before=before), 20)

    assert bool(store.keys(GENERATIONS)) is stays
    assert steps_of(store) == []
