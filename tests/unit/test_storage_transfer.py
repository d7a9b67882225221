"""Checkpoints go to folders of other formats and come back the same."""

import errno
import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import load_file, save_file

from storage import transfer
from storage.appearing import _sweep, appearing
from storage.catalog import Catalog
from storage.contents import Beside, read_contents
from storage.digest import combine, partial_digest, render
from storage.errors import ForeignFormatError
from storage.faulty import FaultyStore
from storage.local import LocalStore
from storage.manifest import body_key
from storage.memory import MemoryStore
from tests.journals import holdfast
from tests.states import VARIED, emptied, saved
from tests.tiers import moved

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A store with one checkpoint, of which three ranks saved some rows each."""
    saved(LocalStore(tmp_path / "store"), VARIED, 10, ranks=3)
    return str(tmp_path / "store")


def digest_of(uri: str) -> str:
    """Return a digest of all of the newest checkpoint, however it is cut."""
    store = LocalStore(Path(uri))
    manifest, _ = Catalog(store).newest_verified()
    assert manifest is not None
    contents = read_contents(store, manifest)
    lanes, beside = [], []
    for name, tensor in contents.tensors.items():
        for offset, (piece, *_) in sorted(tensor.pieces.items()):
            body = store.get(body_key(manifest.step, manifest.epoch, piece.index.shard))
            data = torch.frombuffer(
                bytearray(body[piece.chunk.start : piece.chunk.end]) or bytearray(1),
                dtype=torch.uint8,
            ).numpy()[: piece.chunk.size]
            row = piece.chunk.size // max(piece.chunk.shape[0], 1)
            assert not any(offset[1:])
            lanes.append(partial_digest(name, data, start=offset[0] * row))
        beside.append((name, tensor.dtype, tensor.shape))
    values = [(name, contents.value(name)) for name in contents.values]
    paths = sorted(contents.paths.items())
    return render(combine(lanes)) + sha256(repr((beside, values, paths)).encode()).hexdigest()


@pytest.mark.parametrize("form", ["dcp", "safetensors"])
def test_what_is_taken_out_and_brought_in_again_is_the_same(
    uri: str, tmp_path: Path, form: str
) -> None:
    out, other = tmp_path / "new/out", tmp_path / "other"
    told = moved("export", uri, "--to", out, "--format", form, "--max-file", "100B")
    came = moved("import", out, other, "--step", 7, "--max-shard", "64B")

    assert digest_of(str(other)) == digest_of(uri)
    assert told["tensors"] == came["tensors"] == 5
    assert came["format"] == form
    assert came["shards"] >= 2
    assert holdfast("checkpoint", "verify", str(other)).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other", "store"]


def test_torch_reads_what_was_taken_out_for_it(uri: str, tmp_path: Path) -> None:
    moved("export", uri, "--step", "10@1", "--to", tmp_path / "out", "--format", "dcp")
    found = emptied(VARIED)
    torch_dcp.load(found, storage_reader=torch_dcp.FileSystemReader(tmp_path / "out"))

    assert torch.equal(found["model"]["w"], VARIED["model"]["w"])
    assert torch.equal(found["model"]["half"], VARIED["model"]["half"])
    assert found["optim"] == VARIED["optim"]


def test_safetensors_reads_what_was_taken_out_and_an_index_says_where(
    uri: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    moved("export", uri, "--to", out, "--format", "safetensors", "--max-file", "100B")
    index = json.loads((out / transfer.INDEX).read_text())
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}

    assert len(files) > 1
    for name, file in index["weight_map"].items():
        expected = VARIED["model"][name.removeprefix("model.")]
        assert torch.equal(files[file][name].float(), expected.float())
        assert files[file][name].dtype == expected.dtype
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in VARIED["model"].values())


def test_what_torch_saved_is_brought_in_and_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save(VARIED, storage_writer=torch_dcp.FileSystemWriter(folder, thread_count=2))
    moved("import", folder, tmp_path / "store", "--step", 3)
    again = tmp_path / "again"
    moved("export", tmp_path / "store", "--to", again, "--format", "dcp")
    found = emptied(VARIED)
    torch_dcp.load(found, storage_reader=torch_dcp.FileSystemReader(again))

    assert torch.equal(found["model"]["w"], VARIED["model"]["w"])
    assert found["optim"] == VARIED["optim"]


def test_what_ranks_saved_that_did_not_confer_is_put_together(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save(VARIED, storage_writer=torch_dcp.FileSystemWriter(folder), use_collectives=False)
    assert not (folder / ".metadata").exists()

    assert moved("import", folder, tmp_path / "store", "--step", 3)["tensors"] == 5


def test_a_set_of_which_a_file_is_missing_is_damaged(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moved("export", uri, "--to", out, "--max-file", "100B")
    min(out.glob("*.safetensors")).unlink()

    assert "1 files of 2 are there" in moved("import", out, tmp_path / "s", "--step", 1, code=6)
    max(out.glob("*.safetensors")).rename(out / "a.safetensors")
    assert "tensors that no file has" in moved("import", out, tmp_path / "s", "--step", 1, code=6)


@pytest.mark.parametrize("form", ["dcp", "safetensors"])
def test_a_damaged_checkpoint_is_not_taken_out_and_leaves_nothing(
    uri: str, tmp_path: Path, form: str
) -> None:
    path = Path(uri) / body_key(10, 1, 1)
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)

    said = moved("export", uri, "--to", tmp_path / "out", "--format", form, code=6)

    assert body_key(10, 1, 1) in said
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_target_that_is_there_is_refused_and_stays(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    assert "something is there already" in moved("export", uri, "--to", out, code=2)
    assert list(out.iterdir()) == []
    moved("import", uri, tmp_path / "s", "--step", 1, code=2)  # a store is no such folder
    moved("export", uri, "--to", tmp_path / "x", "--format", "npz", code=2)
    moved("export", uri, "--to", tmp_path / "x", "--max-file", "5", code=2)
    moved("export", uri, "--to", tmp_path / "x", "--step", "11", code=2)


def test_a_store_of_another_run_or_with_that_step_is_refused(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moved("export", uri, "--to", out)

    assert "checkpoints of run dcp, expected b" in moved(
        "import", out, uri, "--step", 11, "--run", "b", code=2
    )
    assert "checkpoint of step 10 already" in moved("import", out, uri, "--step", 10, code=2)
    assert moved("import", out, uri, "--step", 5)["checkpoint"] == "5@2"


def test_an_import_that_is_killed_commits_nothing(uri: str, tmp_path: Path) -> None:
    moved("export", uri, "--to", tmp_path / "out")
    parts, beside = transfer.parts_of_safetensors(tmp_path / "out")
    inner = MemoryStore()
    puts = 0

    def kill(operation: str, _key: str) -> None:
        nonlocal puts
        puts += operation == "put"
        if puts == killed:
            raise InterruptedError

    for killed in range(1, 12):
        puts = 0
        store = FaultyStore(inner, before=kill)
        try:
            transfer.bring_in(store, parts, beside, step=killed, run_id="r", shard_bytes=64)
        except InterruptedError:
            assert Catalog(inner).commits() == []
        else:
            break
    assert killed > 5
    newest, _ = Catalog(inner).newest_verified()
    assert newest is not None
    assert newest.step == killed


def test_what_a_killed_export_left_is_removed_and_what_a_living_one_makes_is_not(
    tmp_path: Path,
) -> None:
    left, other = tmp_path / ".out.1", tmp_path / ".other.1"
    for folder in (left, other):
        folder.mkdir()
        (folder / "half").write_bytes(b"x")
    out = tmp_path / "out"
    with appearing(out) as mine:
        _sweep(tmp_path, "out")
        assert mine.is_dir()

    assert not left.exists()
    assert other.exists()
    assert out.is_dir()


def test_each_folder_that_is_made_on_the_way_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with appearing(tmp_path / "a/b/out"):
        pass

    assert {tmp_path, tmp_path / "a", tmp_path / "a/b"} <= set(synced)


def test_of_two_who_make_a_folder_the_second_is_told_and_the_first_keeps_it(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def make() -> None:
        with appearing(out) as folder:
            (folder / "a").write_bytes(b"second")
            out.mkdir()  # by another process
            (out / "a").write_bytes(b"first")

    with pytest.raises(FileExistsError, match="something is there already"):
        make()
    assert (out / "a").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_without_room_says_so_before_it_writes(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _at: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)

    assert "no room for" in moved("export", uri, "--to", tmp_path / "out", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def part(name: str, shape: tuple[int, ...], whole: tuple[int, ...], at: tuple[int, ...]) -> Any:
    return transfer.Part(name, "F32", shape, whole, at, lambda _: None)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([part("t", (2,), (4,), (0,))], "2 of 4 elements are there: t"),
        ([part("t", (4,), (4,), (1,))], "is not inside"),
        # As many elements as there are, one of them twice.
        ([part("t", (2,), (4,), (0,)), part("t", (2,), (4,), (1,))], "boxes overlap, or leave a"),
        ([part("t", (2,), (4,), (0,)), part("t", (2,), (5,), (2,))], "of different tensors"),
        ([part("t", (1,) * 65, (1,) * 65, (0,) * 65)], "more than 64 dimensions"),
    ],
)
def test_parts_that_are_no_whole_tensors_are_refused_before_anything_is_written(
    parts: list[Any], said: str
) -> None:
    store = MemoryStore()
    whole = [part(f"a{n}", (9,), (9,), (0,)) for n in range(3)]

    with pytest.raises(ForeignFormatError, match=said):
        transfer.bring_in(store, whole + parts, Beside(), step=1, run_id="r", shard_bytes=36)

    assert list(store.keys("")) == []


def test_whole_tensors_that_torch_wrote_as_safetensors_are_brought_in(tmp_path: Path) -> None:
    state = {"w": torch.arange(60.0).reshape(10, 6), "v": torch.arange(5.0)}
    files = {"w": 1, "v": 2}
    writer = torch_dcp.HuggingFaceStorageWriter(str(tmp_path / "in"), files)
    torch_dcp.save(state, storage_writer=writer)

    moved("import", tmp_path / "in", tmp_path / "store", "--step", 3)
    moved("export", tmp_path / "store", "--to", tmp_path / "out")

    (file,) = (tmp_path / "out").glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_tensor_that_is_called_as_the_header_of_safetensors_is_exported_as_dcp_alone(
    tmp_path: Path,
) -> None:
    saved(LocalStore(tmp_path / "store"), {"__metadata__": torch.ones(2)}, 1, ranks=1)
    out = tmp_path / "out"

    said = moved("export", tmp_path / "store", "--to", out, code=1)
    assert "safetensors keep this name for themselves: __metadata__" in said
    assert not out.exists()

    moved("export", tmp_path / "store", "--to", out, "--format", "dcp")
    found = {"__metadata__": torch.zeros(2)}
    torch_dcp.load(found, storage_reader=torch_dcp.FileSystemReader(out))
    assert found["__metadata__"].sum() == 2

    (tmp_path / "in").mkdir()
    save_file({"__metadata__": torch.ones(2), "w": torch.ones(2)}, tmp_path / "in/w.safetensors")
    said = moved("import", tmp_path / "in", tmp_path / "other", "--step", 1, code=6)
    assert "JSON is not as expected" in said
