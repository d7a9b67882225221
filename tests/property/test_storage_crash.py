"""Killed at any operation, whatever is visible as a checkpoint is whole; and work can go on.

The crash is an exception that is no `Exception`, raised before one file system operation: nothing
of the product catches it, so nothing is tidied up, as after a kill.
"""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.blob import BlobStore
from storage.catalog import Catalog
from storage.commit import commit, fetch_shard, write_shard
from storage.errors import StaleEpochError, StorageError
from storage.faulty import FaultyStore
from storage.local import LocalStore
from storage.manifest import body_key, commit_key, index_key, make_manifest
from storage.memory import MemoryStore
from storage.retention import Ladder
from storage.shard import Chunk, ShardMeta, plan, seal

SHARDS = 2
# In memory where the machine has it: hundreds of runs with real syncs would test the disk.
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
LAYOUT = plan(
    [Chunk(fqn="w", state="param", dtype="U8", shape=(64,), global_shape=(128,), offset=(0,))]
)


class Killed(BaseException):
    """Stands for SIGKILL."""


class Countdown:
    """Kills the caller before its operation of this number, counting from 0."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, *_: str) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1


def save(store: BlobStore, step: int, epoch: int) -> None:
    receipts = []
    for shard in range(SHARDS):
        body = bytearray(LAYOUT.size)
        LAYOUT.views(body)["param/w"][:] = bytes([step % 256]) * 64
        meta = ShardMeta(
            run_id="run", model="m", step=step, epoch=epoch, shard=shard, shards=SHARDS
        )
        receipts.append(write_shard(store, seal(LAYOUT, body, meta), body))
    manifest = make_manifest(receipts, run_id="run", model="m", step=step, epoch=epoch)
    commit(store, manifest, newest_epoch_known=epoch)


def assert_every_visible_checkpoint_is_whole(store: BlobStore) -> None:
    found, rejections = Catalog(store).newest_verified()
    being_deleted = {(r.step, r.epoch) for r in rejections if r.reason.startswith("deleting")}
    assert len(being_deleted) == len(rejections)
    assert found is not None
    for record in Catalog(store).commits():
        if (record.step, record.epoch) in being_deleted:
            continue
        assert record.manifest is not None
        for shard in range(record.manifest.shards):
            _, body = fetch_shard(store, record.manifest, shard)
            assert body[-64:] == bytes([record.step % 256]) * 64


def runs_killed_at_every_operation(
    root: Path, prepare: Callable[[BlobStore], None], work: Callable[[BlobStore], object]
) -> Iterator[LocalStore]:
    """Yield the store as it was left by a kill before operation 0, 1, 2, ... of the work."""
    prepared = root / "prepared"
    prepare(LocalStore(prepared))
    for number in itertools.count():
        run = root / f"run-{number}"
        shutil.copytree(prepared, run)
        try:
            work(LocalStore(run, before=Countdown(number)))
        except Killed:
            yield LocalStore(run)
            shutil.rmtree(run)
        else:
            assert number > 10, "the work has more operations than that"
            return


@pytest.fixture
def root() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    yield folder
    shutil.rmtree(folder)


def test_a_save_killed_at_any_operation_leaves_only_whole_checkpoints(root: Path) -> None:
    killed = 0
    for store in runs_killed_at_every_operation(
        root, lambda s: save(s, 10, 1), lambda s: save(s, 20, 1)
    ):
        assert_every_visible_checkpoint_is_whole(store)

        save(store, 20, 1)  # The same save, started over, completes what is there.
        assert_every_visible_checkpoint_is_whole(store)
        found, _ = Catalog(store).newest_verified()
        assert found is not None
        assert found.step == 20
        killed += 1
    assert killed > 30


def test_after_a_kill_the_next_epoch_goes_on_and_nothing_is_left_behind(root: Path) -> None:
    for store in runs_killed_at_every_operation(
        root, lambda s: save(s, 10, 1), lambda s: save(s, 20, 1)
    ):
        save(store, 30, 2)
        Catalog(store).retain(Ladder(last=1))
        store.sweep()

        files = {p.relative_to(store.root).as_posix() for p in store.root.rglob("*") if p.is_file()}
        expected = {commit_key(30, 2)}
        expected |= {key(30, 2, n) for key in (body_key, index_key) for n in range(SHARDS)}
        assert {file for file in files if not file.startswith("verdicts/")} == expected


def test_a_collection_killed_at_any_operation_leaves_only_whole_checkpoints(root: Path) -> None:
    def prepare(store: BlobStore) -> None:
        for step in (10, 20, 30):
            save(store, step, 1)

    for store in runs_killed_at_every_operation(
        root, prepare, lambda s: Catalog(s).retain(Ladder(last=1))
    ):
        assert_every_visible_checkpoint_is_whole(store)

        Catalog(store).retain(Ladder(last=1))
        assert [record.step for record in Catalog(store).commits()] == [30]
        assert len(store.keys("gen/")) == 2 * SHARDS


@given(st.integers(0, 40), st.sampled_from([10, 20, 30]))
def test_two_epochs_that_interleave_at_any_operation_leave_one_commit_of_a_step(
    turn: int, rivals_step: int
) -> None:
    """The newer epoch does its whole save in the middle of the older one's."""
    inner = MemoryStore()
    save(inner, 5, 1)
    calls = itertools.count()

    def overtake(_operation: str, _key: str) -> None:
        if next(calls) == turn:
            save(inner, rivals_step, 2)

    older = FaultyStore(inner, before=overtake)
    try:
        save(older, 20, 1)
        refused = False
    except StaleEpochError:
        refused = True

    records = Catalog(inner).commits()
    standing = [(r.step, r.epoch) for r in records if r.manifest]
    assert len({step for step, _ in standing}) == len(standing)
    assert refused == ((20, 1) not in [(r.step, r.epoch) for r in records])
    if next(calls) > turn:
        assert (rivals_step, 2) in standing
    assert_every_visible_checkpoint_is_whole_or_superseded(inner)


def assert_every_visible_checkpoint_is_whole_or_superseded(store: BlobStore) -> None:
    for record in Catalog(store).commits():
        if record.manifest is None:
            assert record.fault.startswith("superseded")
            continue
        for shard in range(record.manifest.shards):
            fetch_shard(store, record.manifest, shard)


@given(st.integers(0, 4), st.none() | st.integers(0, 6000))
def test_a_store_that_tears_or_loses_one_write_never_shows_a_bad_checkpoint(
    number: int,
    torn_bytes: int | None,
) -> None:
    store = FaultyStore(MemoryStore())
    save(store, 10, 1)
    puts = itertools.count()

    def spoil(operation: str, _key: str) -> None:
        if operation == "put" and next(puts) == number:
            store.tear_at = torn_bytes
            store.lose_confirmation = torn_bytes is None

    store.before = spoil
    for _ in range(2):
        try:
            save(store, 20, 1)
        except StorageError:
            continue
        break

    store.before = lambda _operation, _key: None
    found, rejections = Catalog(store).newest_verified()
    assert found is not None
    assert found.step == (10 if rejections or not store.keys(commit_key(20, 1)) else 20)
    if torn_bytes is None:
        assert found.step == 20
