"""How far a checkpoint is trusted, what bars it, and who keeps it from being deleted."""

import itertools
import threading

import pytest

from storage import verdicts
from storage.blob import BlobStore
from storage.catalog import Catalog
from storage.errors import BlobNotFoundError, StorageUnavailableError
from storage.faulty import FaultyStore
from storage.leases import SKEW_S, Leases
from storage.manifest import body_key, commit_key, verdict_key
from storage.memory import MemoryStore
from storage.retention import Ladder
from storage.verdicts import Trust
from tests.checkpoints import committed, steps_of


def trusted(store: BlobStore, **more: object) -> int | None:
    found, _ = Catalog(store).newest_trusted(**more)  # type: ignore[arg-type]
    return None if found is None else found.step


def test_the_newest_with_enough_trust_is_chosen_and_the_others_say_what_they_have() -> None:
    store = MemoryStore()
    for step in (10, 20, 30):
        committed(store, step)
    catalog = Catalog(store)
    catalog.judge(10, 1, Trust.COMPUTE_VERIFIED.kind, "probes passed")
    catalog.judge(20, 1, Trust.BYTES_VERIFIED.kind, "read back")

    assert trusted(store, at_least=Trust.WRITTEN) == 30
    assert trusted(store) == 20
    assert trusted(store, at_least=Trust.STATE_VERIFIED) == 10
    assert trusted(store, before_step=20) == 10
    assert trusted(store, before_step=10) is None
    assert [r.reason for r in catalog.newest_trusted(at_least=Trust.STATE_VERIFIED)[1]] == [
        "written, expected state verified",
        "bytes verified, expected state verified",
    ]


def test_a_foreign_or_unreadable_checkpoint_is_not_trusted_whatever_was_said_of_it() -> None:
    store = FaultyStore(MemoryStore())
    for step, run_id in ((10, "run"), (20, "run"), (30, "other")):
        committed(store, step, run_id=run_id)
        Catalog(store).judge(step, 1, Trust.BYTES_VERIFIED.kind, "")
    store.flips[commit_key(20, 1)] = 800

    assert trusted(store, run_id="run") == 10


def test_suspicion_and_quarantine_bar_until_they_are_taken_back() -> None:
    store = MemoryStore()
    for step in (10, 20):
        committed(store, step)
    catalog = Catalog(store)
    for judge in (
        lambda: catalog.quarantine(20, 1, "wrong numbers"),
        lambda: catalog.judge(20, 1, verdicts.SUSPECT, "looks odd"),
    ):
        judge()
        # Good bytes say nothing about what is in them.
        catalog.judge(20, 1, Trust.BYTES_VERIFIED.kind, "read back")
        found, rejections = catalog.newest_verified()
        assert found is not None
        assert found.step == 10
        assert len(rejections) == 1

        catalog.release(20, 1, "it was the other node")

        found, _ = catalog.newest_verified()
        assert found is not None
        assert found.step == 20


def test_what_is_being_deleted_is_not_brought_back() -> None:
    store = MemoryStore()
    committed(store, 10)
    catalog = Catalog(store)
    catalog.judge(10, 1, verdicts.DELETING, "old")

    catalog.release(10, 1, "please")

    standing = verdicts.standing_of(store, 10, 1)
    assert standing.kind == verdicts.DELETING
    assert catalog.newest_verified()[0] is None


def test_a_verdict_of_a_kind_that_only_a_newer_program_knows_bars() -> None:
    store = MemoryStore()
    committed(store, 10)
    store.put(verdict_key(10, 1, 0, "weighed-and-found-wanting"), b"{}")

    found, (rejection,) = Catalog(store).newest_verified()

    assert found is None
    assert "unreadable" in rejection.reason


def test_trust_does_not_sink_and_verdicts_keep_their_order() -> None:
    store = MemoryStore()
    catalog = Catalog(store)
    kinds = [Trust.COMPUTE_VERIFIED.kind, Trust.BYTES_VERIFIED.kind, verdicts.QUARANTINED]

    keys = tuple(catalog.judge(10, 1, kind, "") for kind in kinds)

    standing = catalog.standings()[10, 1]
    assert (standing.trust, standing.keys) == (Trust.COMPUTE_VERIFIED, keys)
    assert standing.barred == keys[-1]


def test_two_who_judge_at_once_both_are_on_record() -> None:
    inner = MemoryStore()
    store = FaultyStore(inner)

    def overtake(operation: str, _key: str) -> None:
        if operation == "put":
            store.before = lambda _operation, _key: None
            verdicts.add(inner, 10, 1, verdicts.SUSPECT, "first")

    store.before = overtake
    verdicts.add(store, 10, 1, verdicts.SUSPECT, "second")

    reasons = [verdicts.reason_of(inner, key) for key in verdicts.standing_of(inner, 10, 1).keys]
    assert reasons == ["suspect: first", "suspect: second"]


def test_a_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'fine', expected one of bytes-verified"):
        Catalog(MemoryStore()).judge(10, 1, "fine", "")


def test_a_store_that_does_not_answer_makes_nothing_untrusted() -> None:
    store = FaultyStore(MemoryStore(), down=True)

    with pytest.raises(StorageUnavailableError):
        Catalog(store).newest_trusted()


class Clock:
    now = 1.7e9

    def __call__(self) -> float:
        return self.now


def leased() -> tuple[MemoryStore, Leases, Clock]:
    store, clock = MemoryStore(), Clock()
    for step in (10, 20, 30):
        committed(store, step)
    return store, Leases(store, clock), clock


def test_a_lease_that_is_kept_is_renewed_and_goes_with_its_block() -> None:
    store, _, _ = leased()
    refused, renewed = [], threading.Event()

    def refuse_one(operation: str, key: str) -> None:
        if operation == "put" and key != first:
            if not refused:
                refused.append(key)
                raise StorageUnavailableError("gone for a moment")
            renewed.set()

    watched = FaultyStore(store)
    first = ""
    with Leases(watched, lambda: 0.0).kept(10, 1, "reader", 0.05):
        (first,) = store.keys("leases/")
        watched.before = refuse_one
        assert renewed.wait(10)
        assert store.keys("leases/")

    assert refused
    assert store.keys("leases/") == []


def test_a_lease_that_can_not_be_given_back_does_no_harm_to_what_was_read() -> None:
    store, _, _ = leased()
    watched = FaultyStore(store)

    with Leases(watched, lambda: 0.0).kept(10, 1, "reader", 60.0):
        watched.down = True

    assert len(store.keys("leases/")) == 1


def test_a_lease_keeps_a_checkpoint_until_it_is_given_back() -> None:
    store, leases, _ = leased()
    key = leases.take(10, 1, "reader", 60.0)

    assert Catalog(store).retain(Ladder(last=1), leases=leases) == [(20, 1)]
    assert leases.all_held() == {(10, 1)}

    leases.drop(key)
    assert Catalog(store).retain(Ladder(last=1), leases=leases) == [(10, 1)]
    assert steps_of(store) == [(30, 1)]
    assert store.keys("leases/") == []


def test_a_lease_of_a_dead_reader_ends_with_room_for_clocks_that_differ() -> None:
    store, leases, clock = leased()
    leases.take(10, 1, "reader", 60.0)

    clock.now += 60.0 + SKEW_S - 2
    assert leases.held(10, 1)
    clock.now += 4
    assert not leases.held(10, 1)
    assert Catalog(store).retain(Ladder(last=1), leases=leases) == [(10, 1), (20, 1)]
    assert store.keys("leases/") == []


@pytest.mark.parametrize(
    ("holder", "lasts_s"), [("", 1.0), ("a/b", 1.0), ("a b", 1.0), ("a", 0.0), ("a", 1e9)]
)
def test_a_lease_that_makes_no_sense_is_refused(holder: str, lasts_s: float) -> None:
    _, leases, _ = leased()

    with pytest.raises(ValueError, match="holder is"):
        leases.take(10, 1, holder, lasts_s)


class Reader:
    """Takes a lease before the collector's operation of this number, and reads if it may."""

    def __init__(self, turn: int, bar: str) -> None:
        self.store, self._leases, _ = leased()
        if bar:
            verdicts.add(self.store, 10, 1, bar, "somebody examines it")
        self.calls, self._turn = itertools.count(), turn
        self.reading = self.came = False

    def come(self, _operation: str, _key: str) -> None:
        if next(self.calls) == self._turn:
            self._leases.take(10, 1, "reader", 60.0)
            self.came = True
            self.reading = verdicts.standing_of(self.store, 10, 1).kind != verdicts.DELETING


@pytest.mark.parametrize("bar", ["", verdicts.QUARANTINED, verdicts.SUSPECT])
def test_a_reader_between_any_two_operations_of_a_collector_loses_nothing_that_it_reads(
    bar: str,
) -> None:
    read = []
    for turn in range(200):
        reader = Reader(turn, bar)
        store = FaultyStore(reader.store, before=reader.come)

        Catalog(store).retain(Ladder(last=1), leases=Leases(store, Clock()))

        if not reader.came:
            break
        read.append(reader.reading)
        if reader.reading:
            assert reader.store.get(body_key(10, 1, 0))
            assert (10, 1) in steps_of(reader.store)
    assert not reader.came
    # Early enough, and too late.
    assert {True, False} == set(read)


def test_a_lease_of_what_is_gone_keeps_nothing_and_breaks_nothing() -> None:
    store, leases, _ = leased()
    leases.take(999, 1, "reader", 60.0)

    Catalog(store).retain(Ladder(last=1), leases=leases)

    assert steps_of(store) == [(30, 1)]
    with pytest.raises(BlobNotFoundError):
        store.get(commit_key(10, 1))


@pytest.mark.parametrize("kind", [verdicts.QUARANTINED, verdicts.SUSPECT])
def test_a_release_does_not_take_back_what_was_found_at_the_same_moment(kind: str) -> None:
    store = MemoryStore()
    committed(store, 10)
    verdicts.add(store, 10, 1, verdicts.SUSPECT, "")
    # Both saw the suspicion, and neither saw the other.
    for one in (verdicts.RELEASED, kind):
        store.put(verdict_key(10, 1, 1, one), b"")

    assert verdicts.standing_of(store, 10, 1).kind == kind

    verdicts.add(store, 10, 1, verdicts.RELEASED, "looked at")
    assert verdicts.standing_of(store, 10, 1).barred == ""
