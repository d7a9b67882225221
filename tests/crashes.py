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
from functools import partial
from pathlib import Path

from fsspec.asyn import sync

from storage import verdicts
from storage.blob import BlobStore
from storage.catalog import Catalog
from storage.commit import commit, fetch_shard, write_shard
from storage.digest import BLOCK_BYTES
from storage.errors import (
    ForeignFormatError,
    ShardCorruptError,
    StaleEpochError,
    StorageError,
    StorageUnavailableError,
)
from storage.faulty import FaultyStore
from storage.leases import SKEW_S, Leases
from storage.local import LocalStore
from storage.manifest import body_key, commit_key, digests_key, index_key
from storage.memory import MemoryStore
from storage.remote import S3Store
from storage.retention import Ladder
from storage.scrub import scrub_all
from storage.shard import Chunk, ShardMeta, plan, seal
from storage.wrappers import RetryingStore
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


# A put to a folder and to a bucket, which are several operations each -----------------------------


def local_table(root: Path) -> str:
    """Return the table of a put to a folder, killed after each operation of the file system."""
    cells = []
    for number in itertools.count():
        folder = root / str(number)
        steps: list[str] = []

        def kill(name: str, number: int = number, steps: list[str] = steps) -> None:
            if len(steps) == number:
                raise Killed
            steps.append(name)

        over = True
        try:
            LocalStore(folder / "run", before=kill).put("a/k", b"whole")
        except Killed:
            over = False
        store = LocalStore(folder / "run")
        there = store.keys()
        assert there in ([], ["a/k"])
        if there:
            assert store.get("a/k") == b"whole"
        left = [path for path in folder.rglob(".tmp-*") if path.is_file()]
        removed = "`sweep_old`, after an hour" if left else "-"
        if left:
            swept = [store.root / found.name for found in store.sweep_old(-60.0)]
            assert swept == left
        if not there:
            store.put("a/k", b"again")
        if steps:
            names = (steps[-1], "the blob" if there else "-", "`.tmp-...`" if left else "-")
            cells.append((*names, removed))
        if over:
            return table(("after", "readers see", "left behind", "removed by"), cells)
    raise AssertionError


class Connection:
    """Counts the requests of a store's client, and sends none after so many."""

    def __init__(self, store: S3Store, requests_max: int) -> None:
        self.sent: list[str] = []
        self._max = requests_max
        client = self._client = store._filesystem
        self._call, self._call_soon = client._call_s3, client.call_s3
        client._call_s3 = self.call
        client.call_s3 = partial(sync, client.loop, self.call)

    def restore(self) -> None:
        """Send everything again."""
        self._client._call_s3, self._client.call_s3 = self._call, self._call_soon

    async def call(self, method: str, *arguments: object, **more: object) -> object:
        if len(self.sent) >= self._max:
            raise ConnectionError("killed: nothing is sent any more")
        self.sent.append(method)
        return await self._call(method, *arguments, **more)


def bucket_table(opened: Callable[[], S3Store], size: int) -> str:
    """Return the table of a put to a bucket, killed after each request.

    Args:
        opened: opens a new, empty store with a client of its own.
        size: bytes of the blob.
    """
    cells, data, key = [], bytes(size), body_key(10, 1, 0)
    for number in itertools.count():
        store = opened()
        connection = Connection(store, number)
        over = True
        try:
            store.put(key, data)
        except StorageUnavailableError:
            over = False
        connection.restore()
        there = store.keys()
        assert there in ([], [key])
        if there:
            assert store.size(key) == size
        left = store.sweep_old(3600.0)
        if not there:
            store.put(key, b"the key is free")
        if connection.sent:
            parts = connection.sent.count("upload_part")
            after = connection.sent[-1] + (f" ({parts} of them)" if parts and not there else "")
            left_words = "parts that no listing shows" if left else "-"
            removed = "`sweep_old`, after an hour" if left else "-"
            cells.append((f"`{after}`", "the blob" if there else "-", left_words, removed))
        if over:
            return table(("after", "readers see", "left behind", "removed by"), cells)
    raise AssertionError


# Faults instead of kills --------------------------------------------------------------------------


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
