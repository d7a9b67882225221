"""Stops writers between any two operations, and looks at what is left: the crash matrix.

Nothing of the product catches `Killed`, so nothing is tidied up, as after a kill. Tables are made
of what was seen, and stand in storage/FORMAT.md.
"""

import ast
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from storage import verdicts
from storage.blob import BlobStore
from storage.catalog import Catalog
from storage.commit import commit, fetch_shard, write_shard
from storage.digest import BLOCK_BYTES
from storage.errors import (
    ForeignFormatError,
    ShardCorruptError,
    StaleEpochError,
)
from storage.faulty import FaultyStore
from storage.leases import SKEW_S, Leases
from storage.manifest import body_key, commit_key, digests_key, index_key
from storage.memory import MemoryStore
from storage.retention import Ladder
from storage.scrub import scrub_all
from storage.shard import Chunk, ShardMeta, plan, seal
from tests.checkpoints import SHARDS, brought_in, committed, in_groups, written

NOW = 1.7e9
LATER = NOW + 60.0 + SKEW_S + 1


class Killed(BaseException):
    """Stands for SIGKILL."""


class Killer:
    """Kills the caller before its operation of this number, counting from 0."""

    def __init__(self, number: int) -> None:
        self.left, self.killed = number, False
        self.last = ("", "")

    def come(self, operation: str, key: str) -> None:
        if self.left == 0:
            self.killed = True
            raise Killed
        self.left -= 1
        self.last = (operation, key)


@dataclass(frozen=True)
class Row:
    """What is left when the writer is killed after an operation."""

    after: str
    visible: str
    left: str
    cleaned: str


@dataclass(frozen=True)
class Story:
    """Something that is done to a store, from which it can be kept.

    Attributes:
        name: in the table.
        prepare: brings the store to where it begins; is not killed.
        work: is killed.
        stays: the step that must be there throughout.
    """

    name: str
    prepare: Callable[[BlobStore], object]
    work: Callable[[BlobStore], object]
    stays: int


def leases_of(store: BlobStore, now: float = NOW) -> Leases:
    return Leases(store, lambda: now)


def collect(store: BlobStore, now: float = NOW) -> None:
    Catalog(store).retain(Ladder(last=1), leases=leases_of(store, now))


def save(step: int, epoch: int = 1) -> Callable[[BlobStore], object]:
    return lambda store: committed(store, step, epoch)


def grouped(work: Callable[[BlobStore], object]) -> Callable[[BlobStore], object]:
    """Do it with very many shards, to which the two of a test come if groups are small."""

    def in_such(store: BlobStore) -> None:
        with in_groups():
            work(store)

    return in_such


def several(*steps: int) -> Callable[[BlobStore], None]:
    def prepare(store: BlobStore) -> None:
        for step in steps:
            committed(store, step)

    return prepare


def half_a_save(store: BlobStore) -> None:
    """Leave what a writer leaves that is killed when the first shard is half there."""
    committed(store, 10)
    calls = itertools.count()

    def kill(operation: str, _key: str) -> None:
        if operation == "put" and next(calls) == 1:
            raise Killed

    with contextlib.suppress(Killed):
        committed(FaultyStore(store, before=kill), 20)


def read(store: BlobStore) -> None:
    leases = leases_of(store)
    key = leases.take(10, 1, "reader", 60.0)
    assert not verdicts.standing_of(store, 10, 1).barred
    record = Catalog(store).commits()[-1]
    assert record.manifest is not None
    for shard in range(SHARDS):
        fetch_shard(store, record.manifest, shard)
    leases.drop(key)


def what_nobody_needs(store: BlobStore) -> None:
    """Leave half a save, a whole one that was never committed, and the lease of a dead reader."""
    half_a_save(store)
    written(store, 25)
    leases_of(store).take(10, 1, "dead", 60.0)
    committed(store, 30)
    committed(store, 40)


def quarantined(store: BlobStore) -> None:
    several(10, 20)(store)
    Catalog(store).quarantine(10, 1, "x")


def superseded(store: BlobStore) -> None:
    committed(store, 10)
    committed(store, 10, 2)
    committed(store, 20, 2)


def too_late(store: BlobStore) -> None:
    """Commit, while another writer commits in a newer epoch right before the record is put."""
    others = getattr(store, "inner", store)

    def overtake(operation: str, key: str) -> None:
        if (operation, key) == ("put", commit_key(30, 1)) and not others.keys(commit_key(40, 2)):
            committed(others, 40, 2)

    with contextlib.suppress(StaleEpochError):
        slow = FaultyStore(store, before=overtake)
        commit(slow, written(slow, 30), newest_epoch_known=1)


def spoilt(store: BlobStore) -> None:
    """Save a shard whose memory went bad once it was sealed, and that is verified as it is put."""
    size = BLOCK_BYTES
    layout = plan(
        [
            Chunk(
                fqn="w", state="param", dtype="U8", shape=(size,), global_shape=(size,), offset=(0,)
            )
        ]
    )
    body = bytearray(layout.size)
    meta = ShardMeta(run_id="run", model="m", step=20, epoch=1, shard=0, shards=SHARDS)
    index = seal(layout, body, meta)
    body[-1] ^= 1
    with contextlib.suppress(ShardCorruptError):
        write_shard(store, index, body)


def cut_off(store: BlobStore) -> None:
    with contextlib.suppress(ForeignFormatError):
        brought_in(store, 20, cut_off=True)


STORIES = (
    Story("save and commit", save(10), save(20), 10),
    Story("save again what was half done", half_a_save, save(20), 10),
    Story("save in a newer epoch, beside a half-done one", half_a_save, save(30, 2), 10),
    Story("commit, overtaken by a newer epoch", several(10), too_late, 10),
    Story("save what memory has spoilt", several(10), spoilt, 10),
    Story("import", several(10), lambda store: brought_in(store, 20), 10),
    Story("import what is cut off", several(10), cut_off, 10),
    Story("save and commit very many shards", save(10), grouped(save(20)), 10),
    Story("collect", several(10, 20), collect, 20),
    Story("collect very many shards", grouped(several(10, 20)), collect, 20),
    Story("collect what was quarantined", quarantined, collect, 20),
    Story("collect what a newer epoch stands for", superseded, collect, 20),
    Story(
        "collect what nobody committed, and a lease that has ended",
        what_nobody_needs,
        lambda s: Catalog(s).retain(Ladder(last=9), leases=leases_of(s, LATER)),
        40,
    ),
    Story("quarantine", several(10, 20), lambda s: Catalog(s).quarantine(20, 1, "x"), 10),
    Story("release", quarantined, lambda s: Catalog(s).release(10, 1, "y"), 20),
    Story("scrub", several(10, 20), lambda s: list(scrub_all(Catalog(s))), 20),
    Story("read with a lease", several(10, 20), read, 20),
)


def copy(store: MemoryStore) -> MemoryStore:
    other, keys = MemoryStore(), store.keys()
    for key in keys:
        other.put(key, store.get(key))
    return other


def rows(story: Story) -> Iterator[Row]:
    """Yield a row for each operation of the work that changes the store, in order."""
    prepared = MemoryStore()
    story.prepare(prepared)
    after, seen = "nothing yet", set()
    for number in itertools.count():
        store, killer = copy(prepared), Killer(number)
        with contextlib.suppress(Killed):
            story.work(FaultyStore(store, before=killer.come))
        check(store, story)
        operation, key = killer.last
        if operation in {"put", "delete"}:
            after = f"{operation} {kind_of(key)}"
        row = Row(after, visible(store), left_behind(store), cleaned_by(store, story))
        if (row.after, row.visible, row.left) not in seen:
            seen.add((row.after, row.visible, row.left))
            yield row
        if not killer.killed:
            return


def check(store: BlobStore, story: Story) -> None:
    """Check what must hold after every kill."""
    catalog = Catalog(store)
    barred = catalog.barred()
    records = catalog.commits()
    for record in records:
        if (record.step, record.epoch) in barred or record.superseded:
            continue
        assert record.manifest is not None, f"{story.name}: {record.fault}"
        for shard in range(record.manifest.shards):
            _, body = fetch_shard(store, record.manifest, shard)
            assert body[-64:] == bytes([record.step % 256]) * 64
    found, _ = catalog.newest_verified()
    assert found is not None, f"{story.name}: nothing is left"
    assert story.stays in [record.step for record in records], f"{story.name}: lost a commit"


def kind_of(key: str) -> str:
    """Return what a key is of, in words."""
    if key.startswith("commits/"):
        return "the record"
    if key.startswith("verdicts/"):
        return f"the verdict `{key.rpartition('/')[2][7:].removesuffix('.json')}`"
    if key.startswith("leases/"):
        return "the lease"
    if key.endswith("/digests"):
        return "the digests"
    return "a body" if key.endswith(".st") else "an index"


def visible(store: BlobStore) -> str:
    """Return the checkpoints that readers see, those that are barred in brackets."""
    barred = Catalog(store).barred()
    shown = [
        f"({record.step})" if (record.step, record.epoch) in barred else str(record.step)
        for record in reversed(Catalog(store).commits())
    ]
    return ", ".join(shown)


def garbage(store: BlobStore) -> list[str]:
    """Return the keys that no checkpoint has that can be resumed from, and that are no history."""
    catalog = Catalog(store)
    going = {
        where
        for where, standing in catalog.standings().items()
        if standing.kind == verdicts.DELETING
    }
    needed: set[str] = set()
    for record in catalog.commits():
        if (record.step, record.epoch) not in going:
            where = (record.step, record.epoch)
            needed.add(commit_key(*where))
            needed |= {of(*where, n) for of in (body_key, index_key) for n in range(SHARDS)}
            if record.manifest is not None and record.manifest.grouped:
                needed.add(digests_key(*where))
    keys = store.keys()
    return [key for key in keys if key not in needed and not key.startswith("verdicts/")]


def left_behind(store: BlobStore) -> str:
    """Return in words what is of no use to anybody."""
    keys = garbage(store)
    bodies = {key[:-3] for key in keys if key.endswith(".st")}
    indexes = {key[:-4] for key in keys if key.endswith(".idx")}
    counted = (
        (sum(key.startswith("commits/") for key in keys), "record", "records"),
        (len(bodies & indexes), "shard", "shards"),
        (len(bodies - indexes), "body without index", "bodies without index"),
        (len(indexes - bodies), "index without body", "indexes without body"),
        (sum(key.endswith("/digests") for key in keys), "list of digests", "lists of digests"),
        (sum(key.startswith("leases/") for key in keys), "lease", "leases"),
    )
    words = [f"{n} {one if n == 1 else more}" for n, one, more in counted if n]
    return ", ".join(words) or "-"


def cleaned_by(store: MemoryStore, story: Story) -> str:
    """Return who removes what was left behind."""
    if not garbage(store):
        return "-"
    again = copy(store)
    story.work(again)
    check(again, story)
    if not garbage(again):
        return "the same again"
    later = copy(store)
    committed(later, 90, 3)
    collect(later, LATER)
    assert garbage(later) == [], f"{story.name}: nobody removes it"
    return "the next collect"


def table(titles: tuple[str, ...], cells: list[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def crash_table() -> str:
    """Return the table of what is left after each operation of each story."""
    cells = [
        (story.name, row.after, row.visible, row.left, row.cleaned)
        for story in STORIES
        for row in rows(story)
    ]
    shown = [
        ("" if n and cells[n - 1][0] == line[0] else line[0], *line[1:])
        for n, line in enumerate(cells)
    ]
    titles = ("killed during", "after", "checkpoints then", "left behind", "removed by")
    return table(titles, shown)


# Where the product changes a store, and whether somebody was killed there ------------------------


_STORES = ("blob", "memory", "local", "remote", "parts", "encrypted", "wrappers", "faulty")
"""Modules of `storage` that carry out what others ask for."""


def changing() -> set[tuple[str, str, str]]:
    """Return module, function and operation of each place in `storage` that changes a store."""
    found = set()
    for path in sorted(Path(verdicts.__file__).parent.rglob("*.py")):
        if path.stem in _STORES:
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                asked = isinstance(node, ast.Attribute) and node.attr in {"put", "delete"}
                if asked and ast.unparse(node.value).endswith("store"):
                    found.add((path.stem, function.name, node.attr))
    return found


def killed_at() -> set[tuple[str, str, str]]:
    """Return module, function and operation of each place at which a story is killed."""
    found: set[tuple[str, str, str]] = set()

    def see(operation: str, _key: str) -> None:
        frame = sys._getframe()
        while (path := Path(frame.f_code.co_filename)).parent.name != "storage" or path.stem in (
            *_STORES,
            "parallel",
        ):
            assert frame.f_back is not None
            frame = frame.f_back
        found.add((path.stem, frame.f_code.co_name, operation))

    for story in STORIES:
        store = MemoryStore()
        story.prepare(store)
        story.work(FaultyStore(store, before=see))
    return {place for place in found if place[2] in {"put", "delete"}}
