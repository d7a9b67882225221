"""Which checkpoint to resume from, and which to delete."""

from collections.abc import Callable

import msgspec
import pytest

from storage.catalog import Catalog
from storage.errors import (
    ForeignCheckpointError,
    StaleEpochError,
    StorageRefusedError,
    StorageUnavailableError,
)
from storage.faulty import FaultyStore
from storage.manifest import (
    COMMITS,
    body_key,
    commit_key,
    generation_prefix,
    index_key,
)
from storage.memory import MemoryStore
from storage.retention import Ladder
from storage.verdicts import Trust
from storage.wrappers import CountingStore
from tests.checkpoints import LAYOUT, committed, steps_of, written


def test_an_empty_store_has_nothing_and_rejects_nothing() -> None:
    assert Catalog(MemoryStore()).newest_verified() == (None, [])
    assert Catalog(MemoryStore()).retain(Ladder(last=1)) == []


def test_the_newest_step_is_chosen() -> None:
    store = MemoryStore()
    manifests = [committed(store, step) for step in (9, 10, 100)]

    assert Catalog(store).newest_verified() == (manifests[-1], [])
    assert steps_of(store) == [(100, 1), (10, 1), (9, 1)]


def test_the_newest_before_the_onset_of_a_corruption_is_chosen() -> None:
    store = MemoryStore()
    manifests = [committed(store, step) for step in (80, 90, 100)]

    assert Catalog(store).newest_verified(before_step=100) == (manifests[1], [])
    assert Catalog(store).newest_verified(before_step=80) == (None, [])


def test_an_uncommitted_generation_is_not_seen() -> None:
    store = MemoryStore()
    manifest = committed(store, 10)
    written(store, 20)

    assert Catalog(store).newest_verified() == (manifest, [])


@pytest.mark.parametrize("key_of", [body_key, index_key])
def test_a_lost_shard_makes_the_older_checkpoint_win_and_says_why(key_of: object) -> None:
    store = MemoryStore()
    older = committed(store, 10)
    committed(store, 20)
    key = key_of(20, 1, 1)  # type: ignore[operator]
    store.delete(key)

    found, rejections = Catalog(store).newest_verified()

    assert found == older
    assert [(r.step, r.epoch, r.reason) for r in rejections] == [(20, 1, f"no blob: {key}")]


def test_a_foreign_checkpoint_is_passed_over_and_named() -> None:
    store = MemoryStore()
    ours = committed(store, 10)
    committed(store, 20, run_id="other")

    found, rejections = Catalog(store).newest_verified(run_id="run", model="m")

    assert found == ours
    assert rejections[0].reason.startswith("run is other, expected run")
    assert Catalog(store).newest_verified(model="bigger")[0] is None


def test_a_damaged_record_is_reported_and_the_others_are_still_listed() -> None:
    store = FaultyStore(MemoryStore())
    older = committed(store, 10)
    committed(store, 20)
    store.flips[commit_key(20, 1)] = 8 * 200

    bad, good = Catalog(store).commits()

    assert bad.manifest is None
    assert bad.fault
    assert good.manifest == older


def test_a_record_under_the_wrong_name_is_no_checkpoint() -> None:
    store = MemoryStore()
    committed(store, 10)
    store.put(commit_key(30, 1), store.get(commit_key(10, 1)))

    found, rejections = Catalog(store).newest_verified()

    assert found is not None
    assert found.step == 10
    assert rejections[0].reason == "record is of another checkpoint of step 10, epoch 1"


def test_two_epochs_left_a_commit_of_one_step_and_the_newer_stands() -> None:
    """A writer killed between its put and its second look leaves this."""
    store = MemoryStore()
    zombie = written(store, 10, 1)
    newer = committed(store, 10, 2)
    other = MemoryStore()
    committed(other, 10, 1)
    store.put(commit_key(10, 1), other.get(commit_key(10, 1)))
    assert zombie.root != newer.root

    assert Catalog(store).newest_verified() == (newer, [])
    assert [record.fault for record in Catalog(store).commits()] == ["", "superseded by epoch 2"]


def test_a_store_that_does_not_answer_is_not_taken_for_bad_checkpoints() -> None:
    store = FaultyStore(MemoryStore())
    committed(store, 10)

    def cut(operation: str, key: str) -> None:
        store.down = operation == "get" and key.endswith(".st")

    store.before = cut

    with pytest.raises(StorageUnavailableError):
        Catalog(store).newest_verified()


@pytest.mark.parametrize(
    "key", [commit_key(20, 1), index_key(20, 1, 1), body_key(20, 1, 1)], ids=["rec", "idx", "body"]
)
def test_what_may_not_be_read_is_an_error_and_no_reason_for_an_older_checkpoint(key: str) -> None:
    store = FaultyStore(MemoryStore())
    for step in (10, 20):
        committed(store, step)
    catalog = Catalog(store)
    catalog.judge(20, 1, Trust.BYTES_VERIFIED.kind, "")
    store.refused.add(key)

    calls: list[Callable[[], object]] = [catalog.newest_verified]
    if key.startswith(COMMITS):
        calls += [catalog.newest_trusted, catalog.commits, lambda: catalog.retain(Ladder(last=1))]
    for call in calls:
        with pytest.raises(StorageRefusedError, match=f"Permission denied: {key}"):
            call()

    assert catalog.known() == [(20, 1), (10, 1)]
    # What is older than what is looked for is not asked for.
    older, _ = catalog.newest_verified(before_step=20)
    assert older is not None


def test_a_quarantined_checkpoint_is_passed_over_with_its_reason() -> None:
    store = MemoryStore()
    older = committed(store, 10)
    committed(store, 20)
    catalog = Catalog(store)

    first = catalog.quarantine(20, 1, "gradient norm jumped on gpu-17")
    second = catalog.quarantine(20, 1, "replica vote 3 to 1")

    assert first == "verdicts/20-1/000000-quarantined.json"
    assert second == "verdicts/20-1/000001-quarantined.json"
    found, rejections = catalog.newest_verified()
    assert found == older
    assert rejections[0].reason == "quarantined: replica vote 3 to 1"


def test_a_damaged_verdict_still_counts() -> None:
    store = FaultyStore(MemoryStore())
    committed(store, 10)
    key = Catalog(store).quarantine(10, 1, "suspect")
    store.flips[key] = 7

    found, rejections = Catalog(store).newest_verified()

    assert found is None
    assert "unreadable" in rejections[0].reason


def test_the_last_n_are_kept_and_nothing_remains_of_the_others() -> None:
    store = MemoryStore()
    for step in (10, 20, 30, 40):
        committed(store, step)

    assert Catalog(store).retain(Ladder(last=2)) == [(10, 1), (20, 1)]

    assert steps_of(store) == [(40, 1), (30, 1)]
    assert not store.keys(generation_prefix(10, 1))
    assert not store.keys(generation_prefix(20, 1))
    assert Catalog(store).retain(Ladder(last=2)) == []


def test_the_newest_verified_is_kept_with_all_that_is_newer() -> None:
    store = MemoryStore()
    for step in (10, 20, 30, 40):
        committed(store, step)
    for step in (30, 40):
        store.delete(body_key(step, 1, 0))

    assert Catalog(store).retain(Ladder(last=1)) == [(10, 1)]

    assert steps_of(store) == [(40, 1), (30, 1), (20, 1)]


def test_quarantined_checkpoints_do_not_count_as_kept_and_go_when_older() -> None:
    store = MemoryStore()
    for step in (10, 20, 30, 40):
        committed(store, step)
    catalog = Catalog(store)
    catalog.quarantine(40, 1, "suspect")
    catalog.quarantine(20, 1, "suspect")

    assert catalog.retain(Ladder(last=1)) == [(10, 1), (20, 1)]

    assert steps_of(store) == [(40, 1), (30, 1)]


def test_nothing_is_deleted_while_nothing_can_be_verified() -> None:
    store = MemoryStore()
    for step in (10, 20):
        committed(store, step)
        store.delete(body_key(step, 1, 0))

    assert Catalog(store).retain(Ladder(last=1)) == []
    assert steps_of(store) == [(20, 1), (10, 1)]


def test_a_leased_checkpoint_is_kept_until_the_lease_ends() -> None:
    store = MemoryStore()
    for step in (10, 20):
        committed(store, step)

    assert Catalog(store).retain(Ladder(last=1), leased=lambda *where: where == (10, 1)) == []
    assert Catalog(store).retain(Ladder(last=1)) == [(10, 1)]


def test_what_was_verified_lately_is_not_read_again() -> None:
    store = CountingStore(MemoryStore())
    committed(store, 10)
    newest = committed(store, 20)
    store.bytes_got = 0

    assert Catalog(store).retain(Ladder(last=1), verified=newest) == [(10, 1)]

    assert store.bytes_got < LAYOUT.size


def test_shards_that_cannot_be_committed_any_more_are_collected_and_others_stay() -> None:
    store = MemoryStore()
    written(store, 15, 1)
    written(store, 99, 1)
    committed(store, 20, 2)
    written(store, 19, 2)
    written(store, 30, 2)
    written(store, 5, 3)

    Catalog(store).retain(Ladder(last=1))

    assert [bool(store.keys(generation_prefix(*g))) for g in ((15, 1), (99, 1), (19, 2))] == [
        False
    ] * 3
    assert all(store.keys(generation_prefix(*g)) for g in ((20, 2), (30, 2), (5, 3)))


@pytest.mark.parametrize("first", [100, 10], ids=["all read", "one superseded"])
def test_nothing_goes_from_a_store_that_two_runs_share(first: int) -> None:
    store = MemoryStore()
    committed(store, 10, 1, run_id="short")
    for step in (first, 200, 300):
        committed(store, step, 2, run_id="long")
    before = store.keys()

    for verified in (None, Catalog(store).newest_verified()[0]):
        with pytest.raises(ForeignCheckpointError, match="of runs long, short, expected one run"):
            Catalog(store).retain(Ladder(last=1), verified=verified)

    assert store.keys() == before


def test_the_latest_of_the_running_epoch_is_kept_however_far_an_earlier_epoch_had_come() -> None:
    store = MemoryStore()
    committed(store, 40, 3)
    committed(store, 200, 3)
    committed(store, 60, 4)

    assert Catalog(store).retain(Ladder(last=1)) == [(40, 3)]

    assert steps_of(store) == [(200, 3), (60, 4)]


def test_a_deleted_checkpoint_still_fences_off_its_older_epochs() -> None:
    store = MemoryStore()
    committed(store, 200, 3)
    committed(store, 60, 4)
    catalog = Catalog(store)
    catalog.quarantine(60, 4, "suspect")
    assert catalog.retain(Ladder(last=1)) == [(60, 4)]

    with pytest.raises(StaleEpochError, match="of epoch 4"):
        committed(store, 210, 3)


def test_keeping_none_is_a_callers_mistake() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Catalog(MemoryStore()).retain(Ladder(last=0))


def of_version_1(store: MemoryStore, step: int, epoch: int = 1) -> None:
    """Make a committed checkpoint one of the older version."""
    key = commit_key(step, epoch)
    record = msgspec.json.decode(store.get(key)) | {"version": 1}
    store.delete(key)
    store.put(key, msgspec.json.encode(record))


def test_what_another_version_wrote_never_goes_and_is_named_even_if_it_is_superseded() -> None:
    store = MemoryStore()
    for step, epoch in ((10, 1), (20, 1), (20, 2), (25, 2), (30, 2), (40, 2)):
        committed(store, step, epoch)
    of_version_1(store, 10)
    of_version_1(store, 20)
    bodies = [store.keys(generation_prefix(step, 1)) for step in (10, 20)]
    ladder = Ladder(last=1, anchors=False)

    planned = Catalog(store).plan(ladder)

    assert planned is not None
    assert planned.victims == ((20, 2), (25, 2), (30, 2))
    for where in ((10, 1), (20, 1)):
        assert "version 1, known are 2 and 3" in planned.kept[where]
    assert Catalog(store).retain(ladder) == [(20, 2), (25, 2), (30, 2)]
    assert Catalog(store).known() == [(40, 2), (20, 1), (10, 1)]
    assert [store.keys(generation_prefix(step, 1)) for step in (10, 20)] == bodies
    assert all(bodies)
