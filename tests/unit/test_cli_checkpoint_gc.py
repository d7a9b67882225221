"""`holdfast checkpoint gc`: what goes was shown before, and nothing that is needed."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import typer

from orchestrator.cli import collecting
from storage import verdicts
from storage.errors import StorageRefusedError
from storage.leases import Leases
from storage.local import LocalStore
from storage.manifest import body_key, commit_key, generation_prefix
from tests.checkpoints import LAYOUT, committed, steps_of, written
from tests.journals import Terminal, holdfast
from tests.tiers import damage, data, four, refused, told


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return four(tmp_path / "tier")


def test_a_collection_is_planned_without_touching_anything_and_then_done(store: LocalStore) -> None:
    written(store, 35)
    before = store.keys()

    planned = data(store, "gc", "--keep-last", "2", "--dry-run")

    both = refused("gc", str(store.root), "--keep-last", "2", "--dry-run", "--yes")
    assert "--dry-run and --yes, expected one of them" in both
    assert store.keys() == before
    assert planned["deleted"] == ["10@1", "20@1"]
    assert planned["orphans"] == ["35@1"]
    assert {row["name"]: row["why"] for row in planned["kept"]} == {
        "40@1": "of the newest 2",
        "30@1": "of the newest 2",
    }

    done = data(store, "gc", "--keep-last", "2", "--yes")

    assert done["deleted"] == planned["deleted"]
    assert steps_of(store) == [(40, 1), (30, 1)]
    assert len(store.keys("gen/")) == 8


def test_a_planned_collection_lists_the_unfinished_files_that_would_go_with_it(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, fresh = (store.root / "gen" / f".tmp-elsewhere-7-{n}" for n in range(2))
    old.write_bytes(bytes(2048))
    fresh.touch()
    os.utime(old, (1, 1))

    planned = data(store, "gc", "--keep-last", "3", "--dry-run")
    said = told(store, "gc", "--keep-last", "3", "--dry-run")

    assert planned["unfinished"] == [{"name": f"gen/{old.name}", "bytes": 2048}]
    assert planned["swept"] is None
    assert "to delete: 1 unfinished file of dead writers, 2.0 KiB" in said
    assert f"gen/{old.name}" in said
    assert old.exists()
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "_now", refuses)
        assert "not known: read-only file system" in told(
            store, "gc", "--keep-last", "3", "--dry-run"
        )

    done = data(store, "gc", "--keep-last", "3", "--yes")

    assert (done["unfinished"], done["swept"]) == (planned["unfinished"], 1)
    assert (old.exists(), fresh.exists()) == (False, True)


def test_a_collection_is_not_done_unless_somebody_agrees(store: LocalStore) -> None:
    before = store.keys()

    said = refused("gc", str(store.root), "--keep-last", "1")

    assert "3 checkpoints would be deleted" in said
    assert "--yes" in said
    assert store.keys() == before


def test_what_is_collected_was_shown_before_whatever_became_of_the_store_meanwhile(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(store, 35)
    shown: list[collecting.Collection] = []

    def ponder(planned: collecting.Collection, _uri: str) -> None:
        """Agree, but not before the run has gone on, and something bad was found."""
        shown.append(planned)
        verdicts.add(store, 40, 1, verdicts.QUARANTINED, "")
        for step in (50, 60):
            committed(store, step)
            written(store, step - 5)

    monkeypatch.setattr(collecting, "require_consent", ponder)

    done = data(store, "gc", "--keep-last", "3")

    # By now 20, 30 and 40 could go, and 45 will never be committed: nobody was shown that.
    (planned,) = shown
    assert (planned.going, planned.orphans) == (((10, 1),), ((35, 1),))
    assert (done["deleted"], done["orphans"]) == (["10@1"], ["35@1"])
    assert [step for step, _ in steps_of(store)] == [60, 50, 40, 30, 20]
    assert store.keys(generation_prefix(45, 1))
    assert not store.keys(generation_prefix(35, 1))


def refuses(*_: object) -> NoReturn:
    raise StorageRefusedError("read-only file system: .tmp-*")


def test_what_can_not_be_swept_is_said_before_anything_is_deleted(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: LocalStore, _idle_s: float) -> list[Path]:
        raise StorageRefusedError("Permission denied: .tmp-*")

    monkeypatch.setattr(LocalStore, "sweep_old", fail)
    before = store.keys()

    said = refused("gc", str(store.root), "--keep-last", "1", "--yes", code=1)

    assert "Permission denied: .tmp-*" in said
    assert store.keys() == before


def test_a_folder_that_looks_like_an_unfinished_file_keeps_nothing_from_going(
    store: LocalStore,
) -> None:
    planted = store.root / ".tmp-elsewhere-7-0"
    planted.mkdir()
    os.utime(planted, (1, 1))

    assert data(store, "gc", "--keep-last", "3", "--yes")["deleted"] == ["10@1"]
    assert planted.is_dir()


def test_what_came_to_be_needed_since_it_was_shown_stays(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ponder(_planned: collecting.Collection, _uri: str) -> None:
        verdicts.add(store, 40, 1, verdicts.QUARANTINED, "")
        Leases(store, time.time).take(10, 1, "reader", 60.0)  # noqa: TID251 - as the command

    monkeypatch.setattr(collecting, "require_consent", ponder)

    done = data(store, "gc", "--keep-last", "2")

    assert (done["deleted"], done["leased"]) == ([], ["10@1"])
    assert {"name": "20@1", "why": "needed by now"} in done["kept"]
    assert [step for step, _ in steps_of(store)] == [40, 30, 20, 10]


def test_a_store_that_two_runs_share_is_not_collected(store: LocalStore) -> None:
    committed(store, 400, epoch=2, run_id="another")
    before = store.keys()

    said = refused("gc", str(store.root), "--keep-last", "1", "--yes", code=1)

    assert "checkpoints of runs another, run, expected one run; nothing was deleted" in said
    assert "a store of its own" in said
    assert store.keys() == before


def test_nothing_is_collected_while_nothing_is_whole(store: LocalStore) -> None:
    for step in (10, 20, 30, 40):
        damage(store, body_key(step, 1, 0), LAYOUT.spans[0][0])

    for option in ("--yes", "--dry-run"):
        said = told(store, "gc", "--keep-last", "1", option, code=6)
        assert "last hope" in said
        assert "10@1  chunk" in said or "xxh3-128 is" in said
    came = data(store, "gc", "--yes", code=6)
    assert (came["done"], came["whole"], came["deleted"]) == (False, None, [])
    assert [one["name"] for one in came["refused"]] == ["40@1", "30@1", "20@1", "10@1"]
    assert len(steps_of(store)) == 4


def test_where_all_are_barred_nothing_is_collected_and_nothing_called_damaged(
    store: LocalStore,
) -> None:
    for step in (10, 20, 30, 40):
        verdicts.add(store, step, 1, verdicts.QUARANTINED, "by hand")

    assert "10@1  quarantined: by hand" in told(store, "gc", "--yes", code=1)
    assert len(steps_of(store)) == 4


def test_a_plan_says_which_checkpoint_was_read_before_anything_may_go(store: LocalStore) -> None:
    assert data(store, "gc", "--dry-run")["whole"] == "40@1"
    for step in (10, 20, 30, 40):
        damage(store, body_key(step, 1, 0), LAYOUT.spans[0][0])
    assert data(store, "gc", "--dry-run", code=6)["whole"] is None


@pytest.mark.parametrize(("cause", "code"), [(KeyboardInterrupt, 130), (EOFError, 1)])
def test_a_question_that_is_interrupted_ends_as_any_interrupt_does_and_deletes_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, cause: type[BaseException], code: int
) -> None:
    def listen() -> bool:
        raise cause

    def ask(*_: object, **__: object) -> bool:
        try:
            return listen()
        except cause:
            raise typer.Abort from None  # as the library does

    monkeypatch.setattr(collecting, "sys", SimpleNamespace(stdin=Terminal()))
    monkeypatch.setattr(typer, "confirm", ask)
    before = store.keys()

    assert holdfast("checkpoint", "gc", str(store.root), "--keep-last", "1").exit_code == code
    assert store.keys() == before


def test_a_plan_names_every_checkpoint_and_says_of_each_that_stays_why(store: LocalStore) -> None:
    committed(store, 40, epoch=2)
    verdicts.add(store, 30, 1, verdicts.QUARANTINED, "")
    damage(store, commit_key(20, 1), 100)

    planned = data(store, "gc", "--keep-last", "2", "--dry-run")

    assert {row["name"]: row["why"] for row in planned["kept"]} == {
        "40@2": "of the newest 2",
        "40@1": "later than what is kept",
        "30@1": "later than what is kept",
        "20@1": "later than what is kept",
        "10@1": "of the newest 2",
    }


def test_who_is_to_agree_is_told_of_what_nobody_committed(store: LocalStore) -> None:
    written(store, 35)

    said = refused("gc", str(store.root), "--keep-last", "4")

    assert "1 generation without a commit would be deleted" in said
    assert "0 checkpoints" not in said
