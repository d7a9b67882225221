"""Saves of which a put is answered badly, and what comes of them: the matrix of faults."""

import itertools
from collections.abc import Callable, Iterator

from storage.catalog import Catalog
from storage.errors import (
    StorageError,
)
from storage.faulty import FaultyStore
from storage.memory import MemoryStore
from storage.wrappers import RetryingStore
from tests.checkpoints import SHARDS, committed, in_groups
from tests.crashes import table

FAULTS: dict[str, Callable[[FaultyStore], object]] = {
    "503, too many requests": lambda store: setattr(store, "busy", 1),
    "409, another request at the key": lambda store: setattr(store, "conflicts", 1),
    "412, although the key is free": lambda store: setattr(store, "taken", 1),
    "done, and the answer is lost": lambda store: setattr(store, "lose_confirmation", True),
    "torn after 40 bytes, and no answer": lambda store: setattr(store, "tear_at", 40),
    "no space left, for good": lambda store: setattr(store, "full", True),
    "read-only file system, for good": lambda store: setattr(store, "read_only", True),
    "credentials have expired, for good": lambda store: setattr(store, "expired", True),
    "the clock here differs, for good": lambda store: setattr(store, "skewed", True),
    "shows late": lambda store: setattr(store, "late", lambda _key: True),
}


def fault_cells(name: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield what comes of a save with a fault at each of its puts."""
    puts = 2 * SHARDS + 1
    for number in range(puts):
        place = "record" if number == puts - 1 else ("body", "index")[number % 2]
        yield place, *fault_at(number, name)
    with in_groups():
        yield "digests", *fault_at(puts - 1, name)
        yield "record", *fault_at(puts, name)


def fault_at(number: int, name: str) -> tuple[str, str, str]:
    """Return what comes of a save with a fault at its put of this number, and of it once more."""
    inner = MemoryStore()
    committed(inner, 10)
    faulty, calls = FaultyStore(inner, sleep=lambda _: None), itertools.count()

    def spoil(
        operation: str,
        _key: str,
        store: FaultyStore = faulty,
        calls: Iterator[int] = calls,
    ) -> None:
        if operation == "put" and next(calls) == number:
            FAULTS[name](store)

    faulty.before = spoil
    try:
        committed(RetryingStore(faulty, attempts_max=3, sleep=lambda _: None), 20)
        came = "commits"
    except StorageError as error:
        came = type(error).__name__
    healed = FaultyStore(inner)
    newest, rejections = Catalog(healed).newest_verified()
    assert newest is not None
    assert newest.step == 20 or came != "commits" or rejections, (name, number)
    if came == "commits":
        assert newest.step == 20, f"{name}: an acknowledged commit is gone"
    try:
        committed(healed, 20)
        again = "commits"
    except StorageError as error:
        again = type(error).__name__
    committed(healed, 30, 2)
    found, _ = Catalog(healed).newest_verified()
    assert found is not None
    assert found.step == 30
    return came, str(newest.step), again


def fault_table() -> str:
    """Return the table of what comes of a save when the store answers badly once."""
    cells = []
    for name in FAULTS:
        told = dict.fromkeys(fault_cells(name))
        for n, line in enumerate(told):
            cells.append(("" if n else name, *line))
    titles = ("the put is answered", "of a", "the save", "newest then", "the same save again")
    return table(titles, cells)
