"""`holdfast checkpoint verify` and `scrub`: what is damaged is told, with where and by how much."""

import time
from pathlib import Path

import pytest

from storage.errors import StorageFullError, StorageRefusedError
from storage.leases import Leases
from storage.local import LocalStore
from storage.manifest import body_key, commit_key, index_key
from tests.checkpoints import LAYOUT, committed
from tests.journals import holdfast
from tests.tiers import damage, data, four, refused, told


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return four(tmp_path / "tier")


def test_a_whole_checkpoint_verifies_and_nothing_is_put_on_record(store: LocalStore) -> None:
    before = store.keys()

    (one,) = data(store, "verify")["checkpoints"]

    assert (one["step"], one["damages"], one["fault"]) == (40, [], "")
    assert len(data(store, "verify", "--all")["checkpoints"]) == 4
    assert "whole" in told(store, "verify", "10")
    assert store.keys() == before


def test_damage_is_told_with_file_chunk_expected_and_found_and_has_its_exit_code(
    store: LocalStore,
) -> None:
    key = body_key(30, 1, 1)
    damage(store, key, LAYOUT.spans[1][0])

    came = data(store, "verify", "30", code=6)

    (found,) = came["checkpoints"][0]["damages"]
    assert (found["key"], found["chunk"]) == (key, "param/w")
    assert found["expected"].startswith("xxh3-128 ")
    assert found["found"].startswith("xxh3-128 ")
    text = told(store, "verify", "30", code=6)
    for word in (key, "param/w", found["expected"], found["found"]):
        assert word in text
    assert data(store, "verify", "--all", code=6)["bad"] == 1


def test_an_unreadable_record_is_damage_too(store: LocalStore) -> None:
    damage(store, commit_key(40, 1), 100)

    assert "unreadable" in told(store, "verify", code=6)
    assert "commit record can not be read" in refused("diff", str(store.root), "40", "30", code=6)
    damage(store, index_key(30, 1, 0), 100)
    assert "sha-256" in refused("diff", str(store.root), "30", "20", code=6)


def test_a_scrub_puts_on_record_what_it_found_and_is_done_once(store: LocalStore) -> None:
    damage(store, body_key(30, 1, 0), LAYOUT.spans[0][0])

    first = data(store, "scrub", "--rate", "1GiB", code=6)
    again = data(store, "scrub")

    assert (len(first["checkpoints"]), first["bad"]) == (4, 1)
    assert again["checkpoints"] == []
    states = {row["name"]: (row["state"], row["trust"]) for row in data(store, "ls")}
    assert states["30@1"] == ("suspect", "written")
    assert states["40@1"] == ("readable", "bytes verified")
    assert "nothing to verify" in told(store, "scrub")


def test_one_that_a_newer_epoch_stands_for_is_not_called_damaged(store: LocalStore) -> None:
    committed(store, 40, epoch=2)

    assert [row["state"] for row in data(store, "ls")][:2] == ["readable", "superseded"]
    assert "superseded by epoch 2" in refused("verify", str(store.root), "40@1")


def test_what_a_run_deletes_before_its_turn_to_be_verified_is_not_damaged(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Leases.take

    def too_late(self: Leases, step: int, epoch: int, holder: str, lasts_s: float) -> str:
        for shard in (0, 1) if step == 10 else ():
            for gone in (commit_key(10, 1), body_key(10, 1, shard), index_key(10, 1, shard)):
                store.delete(gone)
        return take(self, step, epoch, holder, lasts_s)

    monkeypatch.setattr(Leases, "take", too_late)

    assert [one["step"] for one in data(store, "verify", "--all")["checkpoints"]] == [40, 30, 20]


@pytest.mark.parametrize("command", [("verify", "--all"), ("scrub",), ("scrub", "--rate", "1GiB")])
def test_each_checkpoint_is_leased_while_it_is_read_and_not_longer(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    get, held = LocalStore.get, []
    leases = Leases(store, time.time)  # noqa: TID251 - as the command

    def watched(self: LocalStore, key: str, start: int = 0, length: int | None = None) -> bytes:
        if key.endswith(".st"):
            held.append((key, leases.all_held()))
        return get(self, key, start, length)

    monkeypatch.setattr(LocalStore, "get", watched)

    data(store, *command)

    assert held == [
        (body_key(step, 1, shard), {(step, 1)}) for step in (40, 30, 20, 10) for shard in (0, 1)
    ]
    assert store.keys("leases/") == []


def test_a_full_disk_keeps_nobody_from_verifying(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise StorageFullError("no space left on the device")

    monkeypatch.setattr(Leases, "take", full)

    assert data(store, "verify")["bad"] == 0


def test_who_may_read_and_write_and_not_delete_is_told_what_came_of_it(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: LocalStore, key: str) -> None:
        raise StorageRefusedError(f"AccessDenied: {key}")

    monkeypatch.setattr(LocalStore, "delete", refuse)

    result = holdfast("checkpoint", "verify", str(store.root))

    assert (result.exit_code, "whole" in result.stdout) == (0, True)
    assert "lease is not given back, and ends by itself in 6 h: AccessDenied" in result.stderr


def test_a_scrub_that_may_not_write_says_what_reads_all_the_same(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: LocalStore, key: str, _data: object) -> None:
        raise StorageRefusedError(f"Read-only file system: {key}")

    monkeypatch.setattr(LocalStore, "put", refuse)

    said = refused("scrub", str(store.root), code=1)

    assert "what was found can not be put on record: Read-only file system: verdicts/40-1" in said
    assert "`holdfast checkpoint verify --all` reads as much and writes nothing" in said
