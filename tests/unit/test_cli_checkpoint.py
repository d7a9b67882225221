"""`holdfast checkpoint`: any store, no run, no torch."""

import base64
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from storage import verdicts
from storage.address import open_store
from storage.local import LocalStore
from storage.manifest import body_key, commit_key
from storage.verdicts import Trust
from tests.buckets import Server
from tests.checkpoints import LAYOUT, brought_in, committed, steps_of
from tests.journals import holdfast
from tests.tiers import damage, data, four, refused, told


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return four(tmp_path / "tier")


@pytest.fixture
def tensors(tmp_path: Path) -> LocalStore:
    """A store with checkpoints of which the tensors are whole."""
    store = LocalStore(tmp_path / "tier")
    for step in (10, 20, 30, 40):
        brought_in(store, step)
    return store


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


def test_two_checkpoints_are_compared_tensor_by_tensor(store: LocalStore) -> None:
    same = data(store, "diff", "40", "40")
    differs = data(store, "diff", "40", "30", code=1)

    assert same["same"]
    assert set(same["tensors"].values()) == {"same"}
    assert set(differs["tensors"].values()) == {"differs"}
    assert "2 tensors differs" in told(store, "diff", "40", "30", code=1)


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


@pytest.mark.parametrize("command", [("scrub",), ("gc", "--dry-run"), ("verify", "--all")])
def test_where_there_is_no_checkpoint_nobody_says_that_all_is_well(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *options = command

    assert "there is no checkpoint" in refused(name, str(tmp_path), *options, code=1)


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
