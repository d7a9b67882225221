"""`holdfast checkpoint`: any store, no run, no torch."""

import base64
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import typer

from orchestrator.cli import collecting
from storage import verdicts
from storage.address import open_store
from storage.errors import StorageFullError, StorageRefusedError
from storage.leases import Leases
from storage.local import LocalStore
from storage.manifest import body_key, commit_key, generation_prefix, index_key
from storage.verdicts import Trust
from tests.buckets import Server
from tests.checkpoints import LAYOUT, brought_in, committed, steps_of, written
from tests.journals import Terminal, holdfast


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "tier")
    for step in (10, 20, 30, 40):
        committed(store, step)
    return store


@pytest.fixture
def tensors(tmp_path: Path) -> LocalStore:
    """A store with checkpoints of which the tensors are whole."""
    store = LocalStore(tmp_path / "tier")
    for step in (10, 20, 30, 40):
        brought_in(store, step)
    return store


def told(store: LocalStore, command: str, *arguments: str, code: int = 0) -> str:
    result = holdfast("checkpoint", command, str(store.root), *arguments)
    assert result.exit_code == code, result.output
    return str(result.stdout)


def data(store: LocalStore, command: str, *arguments: str, code: int = 0) -> Any:
    return json.loads(told(store, command, *arguments, "-o", "json", code=code))


def refused(command: str, *arguments: str, code: int = 2) -> str:
    result = holdfast("checkpoint", command, *arguments)
    assert result.exit_code == code, result.output
    return str(result.stderr)


def damage(store: LocalStore, key: str, at: int) -> None:
    path = store.root / key
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_the_list_says_how_far_each_is_trusted_and_what_bars_it(store: LocalStore) -> None:
    verdicts.add(store, 20, 1, Trust.STATE_VERIFIED.kind, "")
    verdicts.add(store, 30, 1, verdicts.QUARANTINED, "")
    damage(store, commit_key(10, 1), 100)

    rows = data(store, "ls")

    assert [(row["name"], row["state"], row["trust"]) for row in rows] == [
        ("40@1", "readable", "written"),
        ("30@1", "quarantined", "written"),
        ("20@1", "readable", "state verified"),
        ("10@1", "unreadable", "written"),
    ]
    assert rows[0]["bytes"] == 2 * LAYOUT.size
    assert "40@1" in told(store, "ls")
    assert told(store, "ls", "-o", "name").splitlines()[0] == "checkpoint/40@1"


def test_one_is_shown_with_its_history(store: LocalStore) -> None:
    told(store, "quarantine", "20", "--reason", "loss\x1b[31m went up")
    told(store, "release", "20@1", "--reason", "it came down again")

    shown = data(store, "show", "step-20")

    assert shown["state"] == "readable"
    assert shown["verdicts"] == [
        "quarantined: loss\x1b[31m went up",
        "released: it came down again",
    ]
    assert shown["layout"] == {"dpShard": 2}
    text = told(store, "show", "20")
    assert "released: it came down again" in text
    # What anybody may have written into a store is no command to the terminal.
    assert "\x1b" not in text


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


def test_two_checkpoints_are_compared_tensor_by_tensor(store: LocalStore) -> None:
    same = data(store, "diff", "40", "40")
    differs = data(store, "diff", "40", "30", code=1)

    assert same["same"]
    assert set(same["tensors"].values()) == {"same"}
    assert set(differs["tensors"].values()) == {"differs"}
    assert "2 tensors differs" in told(store, "diff", "40", "30", code=1)


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


def refuses(*_: object) -> NoReturn:
    raise StorageRefusedError("read-only file system: .tmp-*")


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


def test_the_way_back_behind_a_corruption_is_told_and_not_taken(store: LocalStore) -> None:
    for step in (10, 20):
        verdicts.add(store, step, 1, Trust.BYTES_VERIFIED.kind, "")
    verdicts.add(store, 40, 1, verdicts.QUARANTINED, "")
    before = store.keys()

    planned = data(store, "rollback-plan", "--onset", "25")

    assert planned["resume"] == "20@1"
    assert planned["lost_steps"] == 20
    assert planned["quarantine"] == ["30@1"]
    assert f"holdfast checkpoint quarantine {store.root} 30@1" in planned["commands"][0]
    assert store.keys() == before
    assert data(store, "rollback-plan", "--onset", "35", "--trust", "written")["resume"] == "30@1"
    nothing = told(store, "rollback-plan", "--onset", "5", code=1)
    assert "nothing" in nothing
    unverified = told(
        store, "rollback-plan", "--onset", "25", "--trust", "compute-verified", code=1
    )
    assert "20@1: bytes verified, expected compute verified" in unverified


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ls", "gs://x"), "supported are a folder"),
        (("ls", ""), "address is empty"),
        (("ls", "{root}/absent"), "there is no folder"),
        (("show", "{root}", "99"), "no checkpoint '99'"),
        (("verify", "{root}", "10", "--all"), "--all was given"),
        (("scrub", "{root}", "--rate", "fast"), "rate is 'fast', expected bytes per second"),
        (("rollback-plan", "{root}", "--onset", "1", "--trust", "blind"), "trust is 'blind'"),
        (("ls", "s3://me:hunter2@bucket"), "name or password"),
        (("ls", "s3:me:hunter2@bucket"), "name or password"),
    ],
)
def test_a_mistake_is_one_message_and_a_hint(
    store: LocalStore, arguments: tuple[str, ...], says: str
) -> None:
    said = refused(*(word.format(root=store.root) for word in arguments))

    assert says in said
    assert "hint: " in said
    assert "hunter2" not in said


def test_a_folder_without_checkpoints_is_told_apart_from_one_that_is_not_there(
    tmp_path: Path,
) -> None:
    assert "there is no checkpoint" in refused("show", str(tmp_path), code=1)


def test_a_file_in_place_of_the_commits_is_not_taken_for_a_run_that_has_saved_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "commits").write_bytes(b"")

    said = refused("ls", str(tmp_path), code=1)

    assert "commits is a file, expected a folder of commit records" in said
    (tmp_path / "commits").unlink()
    assert holdfast("checkpoint", "ls", str(tmp_path)).exit_code == 0


def test_a_bucket_is_as_good_as_a_folder(s3: Server) -> None:
    bucket = s3.bucket()
    uri = s3.uri(bucket)
    store = open_store(uri)
    for step in (10, 20):
        committed(store, step)

    assert holdfast("checkpoint", "verify", uri, "--all", "-q").exit_code == 0
    assert holdfast("checkpoint", "gc", uri, "--keep-last", "1", "--yes").exit_code == 0
    assert steps_of(store) == [(20, 1)]
    s3.drop(bucket)
    gone = holdfast("checkpoint", "ls", uri)
    assert gone.exit_code == 1
    assert f"there is no bucket {bucket}" in gone.stderr


def test_neither_torch_nor_the_trainer_is_needed(store: LocalStore) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['trainer'] = None\n"
        "from orchestrator.cli.commands import app\n"
        f"app(['checkpoint', 'verify', {str(store.root)!r}, '--all'])"
    )

    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("whole") == 4


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


def test_what_is_to_be_done_can_be_given_to_a_shell(store: LocalStore) -> None:
    address = f"file://{store.root}/it%20s;a"
    (store.root / "it s;a").mkdir()
    committed(open_store(address), 10)

    result = holdfast("checkpoint", "rollback-plan", address, "--onset", "5")

    assert shlex.split(result.stdout.splitlines()[-1].strip())[3] == address


def of_another_version(store: LocalStore, step: int) -> None:
    """Have the record of a checkpoint be one that only a newer program knows."""
    path = store.root / commit_key(step, 1)
    path.write_bytes(path.read_bytes().replace(b'"version":2', b'"version":4'))


def test_what_only_another_version_can_read_is_told_and_not_called_damaged(
    store: LocalStore,
) -> None:
    of_another_version(store, 30)

    assert [row["state"] for row in data(store, "ls")][:2] == ["readable", "unsupported"]
    said = refused("verify", str(store.root), "30", code=1)
    assert "manifest has version 4, known are 2 and 3" in said
    assert "with the version of Holdfast that wrote it" in said
    for command in (("verify", "--all"), ("scrub",)):
        came = data(store, *command, code=1)
        assert (len(came["checkpoints"]), came["bad"]) == (4, 0)
    assert "30@1  not read: manifest has version 4" in told(store, "verify", "--all", code=1)
    refused("diff", str(store.root), "30", "40", code=1)
    damage(store, body_key(20, 1, 0), LAYOUT.spans[0][0])
    assert data(store, "verify", "--all", code=6)["bad"] == 1


def test_one_that_a_newer_epoch_stands_for_is_compared_and_taken_out_by_nobody(
    store: LocalStore, tmp_path: Path
) -> None:
    committed(store, 40, epoch=2)

    said = refused("diff", str(store.root), "40@1", "40@2")
    assert "checkpoint 40@1 is superseded by epoch 2" in said
    assert "`40` alone means the one that stands for it" in said
    refused("export", str(store.root), "--step", "40@1", "--to", str(tmp_path / "out"))


def test_what_is_shown_has_the_same_fields_whatever_can_be_read(store: LocalStore) -> None:
    whole = data(store, "show", "30")
    damage(store, commit_key(40, 1), 100)

    assert data(store, "show", "40").keys() == whole.keys()


def test_who_may_read_and_write_and_not_delete_is_told_what_came_of_it(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: LocalStore, key: str) -> None:
        raise StorageRefusedError(f"AccessDenied: {key}")

    monkeypatch.setattr(LocalStore, "delete", refuse)

    result = holdfast("checkpoint", "verify", str(store.root))

    assert (result.exit_code, "whole" in result.stdout) == (0, True)
    assert "lease is not given back, and ends by itself in 6 h: AccessDenied" in result.stderr


@pytest.mark.parametrize("command", [("scrub",), ("gc", "--dry-run"), ("verify", "--all")])
def test_where_there_is_no_checkpoint_nobody_says_that_all_is_well(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *options = command

    assert "there is no checkpoint" in refused(name, str(tmp_path), *options, code=1)


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


@pytest.mark.parametrize(
    "command",
    [("verify",), ("verify", "--all"), ("scrub",), ("export", "--to", "{out}"), ("gc", "--yes")],
)
def test_who_is_interrupted_while_reading_leaves_nothing_behind(
    tensors: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    get, before = LocalStore.get, tensors.keys()

    def interrupted(self: LocalStore, key: str, start: int = 0, length: int | None = None) -> bytes:
        if key.endswith(".st"):
            raise KeyboardInterrupt
        return get(self, key, start, length)

    monkeypatch.setattr(LocalStore, "get", interrupted)
    name, *options = (word.format(out=tmp_path / "out") for word in command)

    assert holdfast("checkpoint", name, str(tensors.root), *options).exit_code == 130
    assert tensors.keys() == before
    assert [path.name for path in tmp_path.iterdir()] == ["tier"]


def test_the_newest_that_is_taken_out_is_one_that_nothing_bars(
    tensors: LocalStore, tmp_path: Path
) -> None:
    verdicts.add(tensors, 40, 4, verdicts.QUARANTINED, "")

    came = data(tensors, "export", "--to", str(tmp_path / "newest"))
    named = data(tensors, "export", "--step", "40", "--to", str(tmp_path / "named"))

    assert (came["checkpoint"], came["state"]) == ("30@3", "readable")
    assert (named["checkpoint"], named["state"]) == ("40@4", "quarantined")
    words = told(tensors, "export", "--step", "40", "--to", str(tmp_path / "again"))
    assert "checkpoint 40@4, quarantined, is in" in words
    for step in (10, 20, 30):
        verdicts.add(tensors, step, step // 10, verdicts.SUSPECT, "")
    said = refused("export", str(tensors.root), "--to", str(tmp_path / "none"), code=1)
    assert "every checkpoint is barred, the newest is 40@4" in said


def test_what_is_being_deleted_is_not_taken_out(tensors: LocalStore, tmp_path: Path) -> None:
    verdicts.add(tensors, 40, 4, verdicts.DELETING, "")

    said = refused(
        "export", str(tensors.root), "--step", "40", "--to", str(tmp_path / "out"), code=1
    )

    assert "checkpoint 40@4 is being deleted" in said
    assert tensors.keys("leases/") == []


def test_a_folder_that_is_none_is_said_to_be_none(tensors: LocalStore, tmp_path: Path) -> None:
    file, step = tmp_path / "file", ("--step", "1")
    file.write_bytes(b"")
    data(tensors, "export", "--to", str(tmp_path / "out"))

    assert f"not a folder: {file}" in refused("ls", str(file))
    assert f"not a folder: {file}" in refused("import", str(tmp_path / "out"), str(file), *step)
    assert f"not a folder: {file}" in refused("import", str(file), str(tmp_path / "s"), *step)
    said = refused("import", str(tmp_path / "absent"), str(tmp_path / "s"), *step)
    assert f"there is no folder: {tmp_path / 'absent'}" in said
    assert not (tmp_path / "s").exists()


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


def test_a_reason_of_any_bytes_is_put_on_record(store: LocalStore) -> None:
    told(store, "quarantine", "20", "--reason", os.fsdecode(b"a\xffb"))

    assert data(store, "show", "20")["verdicts"] == ["quarantined: a?b"]


def test_a_key_that_is_wrong_or_not_given_is_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIGHT", base64.b64encode(bytes(32)).decode())
    monkeypatch.setenv("WRONG", base64.b64encode(bytes(range(32))).decode())
    address = f"file://{tmp_path}"
    for step in (10, 20):
        committed(open_store(f"{address}?encrypt=RIGHT"), step)

    for command in (("verify",), ("ls",), ("gc", "--dry-run"), ("show",), ("scrub",)):
        name, *options = command
        assert holdfast("checkpoint", name, f"{address}?encrypt=RIGHT", *options).exit_code == 0
        wrong = refused(name, f"{address}?encrypt=WRONG", *options, code=1)
        assert "the one given is" in wrong
        assert "Compare the key in the environment" in wrong
        without = refused(name, address, *options)
        assert "checkpoints are encrypted, and the address names no key" in without
        assert "?encrypt=NAME" in without


def test_a_scrub_that_may_not_write_says_what_reads_all_the_same(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: LocalStore, key: str, _data: object) -> None:
        raise StorageRefusedError(f"Read-only file system: {key}")

    monkeypatch.setattr(LocalStore, "put", refuse)

    said = refused("scrub", str(store.root), code=1)

    assert "what was found can not be put on record: Read-only file system: verdicts/40-1" in said
    assert "`holdfast checkpoint verify --all` reads as much and writes nothing" in said


def test_a_put_that_is_interrupted_at_the_terminal_leaves_no_unfinished_file(
    store: LocalStore,
) -> None:
    def interrupt(operation: str) -> None:
        if operation == "sync file":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LocalStore(store.root, before=interrupt).put("a/k", b"x")

    assert list(store.root.rglob(".tmp-*")) == []
    store.put("a/k", b"y")
