"""What the contract cannot see of the local store: durability, left-overs, refusals."""

import errno
import fcntl
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from storage.blob import get_into
from storage.errors import (
    BlobExistsError,
    BlobNotFoundError,
    StorageFullError,
    StorageRefusedError,
    StorageUnavailableError,
)
from storage.local import LocalStore


def temporaries(root: Path) -> list[str]:
    return [path.name for path in root.rglob(".tmp-*")]


def test_the_file_is_synced_before_its_name_appears_and_the_folder_after(tmp_path: Path) -> None:
    steps: list[str] = []

    LocalStore(tmp_path / "run", before=steps.append).put("a/k", b"x")

    assert steps == [
        *("make folder", "sync folder", "make folder", "sync folder"),
        *("create temporary", "write", "sync file", "link", "unlink temporary"),
        *("sync folder", "sync folder"),
    ]


def test_a_name_that_is_taken_is_made_durable_before_the_caller_relies_on_it(
    tmp_path: Path,
) -> None:
    LocalStore(tmp_path).put("a/k", b"x")
    steps: list[str] = []

    with pytest.raises(BlobExistsError):
        LocalStore(tmp_path, before=steps.append).put("a/k", b"x")

    assert steps[-3:] == ["link", "sync folder", "sync folder"]


@pytest.mark.parametrize("step", ["write", "sync file", "link"])
def test_a_disk_that_fills_up_leaves_nothing_and_says_so(tmp_path: Path, step: str) -> None:
    def fill_up(name: str) -> None:
        if name == step:
            raise OSError(errno.ENOSPC, "No space left on device")

    store = LocalStore(tmp_path, before=fill_up)

    with pytest.raises(StorageFullError, match="no space left") as caught:
        store.put("a/k", b"x")

    assert caught.value.retryable
    assert "Free space" in caught.value.hint
    assert temporaries(tmp_path) == []
    assert store.keys() == []


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EDQUOT, StorageFullError),
        (errno.EROFS, StorageRefusedError),
        (errno.EPERM, StorageRefusedError),
        (errno.EIO, StorageUnavailableError),
        (errno.ESTALE, StorageUnavailableError),
    ],
)
def test_an_error_of_the_file_system_says_what_the_caller_can_do(
    tmp_path: Path, number: int, error: type[Exception]
) -> None:
    def refuse(name: str) -> None:
        if name == "link":
            raise OSError(number, os.strerror(number))

    with pytest.raises(error, match="k"):
        LocalStore(tmp_path, before=refuse).put("k", b"x")


def test_a_temporary_file_that_was_swept_under_a_writer_can_be_tried_again(tmp_path: Path) -> None:
    def sweep(name: str) -> None:
        if name == "link":
            for path in tmp_path.rglob(".tmp-*"):
                path.unlink()

    with pytest.raises(StorageUnavailableError, match="swept"):
        LocalStore(tmp_path, before=sweep).put("k", b"x")


def test_left_overs_of_a_killed_process_are_invisible_and_swept(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from storage.local import LocalStore
def die(step):
    if step == "link":
        os._exit(9)
LocalStore(Path(sys.argv[1]), before=die).put("a/k", b"x" * 1000)
"""
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        check=False,
        timeout=60,
    )
    assert killed.returncode == 9
    store = LocalStore(tmp_path)

    assert store.keys() == []
    assert len(temporaries(tmp_path)) == 1
    assert len(store.sweep()) == 1
    assert temporaries(tmp_path) == []
    store.put("a/k", b"new")
    assert store.get("a/k") == b"new"


def test_a_sweep_spares_the_living_and_other_hosts(tmp_path: Path) -> None:
    host = socket.gethostname()
    ours, parent, other = (
        tmp_path / name
        for name in (f".tmp-{host}-{os.getpid()}-999999", f".tmp-{host}-1-0", ".tmp-node-b-7-0")
    )
    for path in (ours, parent, other):
        path.touch()
    (tmp_path / ".tmp-notes").touch()
    store = LocalStore(tmp_path)

    assert store.sweep() == [ours]  # An earlier process had our number; process 1 always lives.
    assert store.sweep(gone_hosts=["node-b"]) == [other]


def test_what_nobody_has_written_to_for_long_is_removed_whoever_it_is_of(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("gen/a", b"x")
    fresh, old, ours = (
        tmp_path / "gen" / name
        for name in (".tmp-node-b-7-0", ".tmp-node-b-7-1", f".tmp-{socket.gethostname()}-1-0")
    )
    blob, notes = tmp_path / "gen" / "a", tmp_path / ".tmp-notes"
    for path in (fresh, old, ours, notes):
        path.touch()
    old.write_bytes(b"half")
    for path in (old, ours, notes, blob):
        os.utime(path, (1, 1))

    found = store.left_over(3600)

    assert found == sorted([(f"gen/{ours.name}", 0), (f"gen/{old.name}", 4)])
    assert old.exists()
    assert store.sweep_old(3600) == found

    assert fresh.exists()
    assert notes.exists()
    assert store.keys() == ["gen/a"]
    assert len(temporaries(tmp_path)) == 2


def test_a_folder_or_a_link_in_place_of_an_unfinished_file_is_left_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    folder, link = tmp_path / ".tmp-node-b-7-0", tmp_path / ".tmp-node-b-7-1"
    folder.mkdir()
    link.symlink_to(folder)
    for path in (folder, link):
        os.utime(path, (1, 1), follow_symlinks=False)

    assert store.sweep_old(3600) == []
    assert store.sweep(gone_hosts={"node-b"}) == []

    assert folder.is_dir()
    assert link.is_symlink()


def test_a_store_that_is_not_there_yet_has_nothing_to_sweep(tmp_path: Path) -> None:
    assert LocalStore(tmp_path / "none").sweep_old(0.0) == []
    assert not (tmp_path / "none").exists()


def test_a_sweep_during_a_put_of_the_same_process_does_not_take_its_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    writer = LocalStore(tmp_path, before=lambda _: store.sweep() and None)

    writer.put("a/k", b"x")

    assert store.get("a/k") == b"x"


def test_the_folders_of_deleted_blobs_go_too_but_not_the_root(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    store.put("a/b/c", b"")
    store.put("a/d", b"")

    store.delete("a/b/c")
    assert sorted(p.name for p in (tmp_path / "run" / "a").iterdir()) == ["d"]
    store.delete("a/d")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_read_does_not_look_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", refuse)

    with pytest.raises(StorageUnavailableError):
        LocalStore(tmp_path).keys()


def test_a_pipe_that_lies_where_a_blob_should_be_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")

    with pytest.raises(BlobNotFoundError):
        LocalStore(tmp_path).get("a")


@pytest.mark.parametrize("beyond", [0, 1, 4097])
@pytest.mark.parametrize("aligned", [True, False])
def test_a_large_blob_is_the_same_whichever_way_it_goes(
    tmp_path: Path, *, aligned: bool, beyond: int
) -> None:
    size, skip = (17 << 20) + beyond, 0 if aligned else 1
    memory = memoryview(mmap.mmap(-1, size + skip))[skip:]
    memory[:] = os.urandom(size)
    store = LocalStore(tmp_path)

    store.put("a/b", memory)

    assert (tmp_path / "a/b").read_bytes() == memory
    # Read to where a blob of this length ends, and to beyond its end.
    arrived = memoryview(mmap.mmap(-1, size + skip + 5000))[skip:]
    assert get_into(store, "a/b", 0, arrived) == size
    assert arrived[:size] == memory
    assert get_into(store, "a/b", 4096, arrived[: 16 << 20]) == 16 << 20
    assert arrived[: 16 << 20] == memory[4096 : 4096 + (16 << 20)]


@pytest.mark.parametrize("refused_at", [1, 2, 3])
def test_a_file_system_without_a_way_past_the_cache_is_written_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_at: int
) -> None:
    memory = memoryview(mmap.mmap(-1, 40 << 20))
    memory[:] = os.urandom(len(memory))
    write, direct = os.write, []

    def refusing(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(len(data))
            if len(direct) == refused_at:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", refusing)

    LocalStore(tmp_path).put("a/b", memory)

    assert len(direct) == refused_at
    assert (tmp_path / "a/b").read_bytes() == memory
