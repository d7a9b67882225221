"""Checkpoints go to folders of other formats and come back the same, and nothing of them is run."""

import errno
import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from storage import distcp, transfer
from storage.appearing import _sweep, appearing
from storage.catalog import Catalog
from storage.contents import Beside, read_contents
from storage.dcp.items import value_of
from storage.digest import combine, partial_digest, render
from storage.errors import ForbiddenPickleError, ForeignFormatError, UnstorableError
from storage.faulty import FaultyStore
from storage.local import LocalStore
from storage.manifest import body_key
from storage.memory import MemoryStore
from tests.journals import holdfast
from tests.states import saved

STATE: dict[str, Any] = {
    "model": {
        "w": torch.arange(35.0).reshape(7, 5),
        "half": torch.arange(6).to(torch.bfloat16).reshape(2, 3),
        "f8": torch.arange(4.0).to(torch.float8_e5m2),
        "mask": torch.tensor([True, False, True]),
        "none": torch.empty(0, 3),
    },
    "optim": {"groups": [{"lr": 0.1, "betas": (0.9, 0.95)}], "seen": OrderedDict(a=b"\xff")},
}


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A store with one checkpoint, of which three ranks saved some rows each."""
    saved(LocalStore(tmp_path / "store"), STATE, 10, ranks=3)
    return str(tmp_path / "store")


def run(command: str, *arguments: object, code: int = 0) -> Any:
    result = holdfast("checkpoint", command, *map(str, arguments), "-o", "json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else str(result.stderr)


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


def emptied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: emptied(item) for key, item in value.items()}
    return [emptied(item) for item in value] if isinstance(value, list) else "?"


@pytest.mark.parametrize("form", ["dcp", "safetensors"])
def test_what_is_taken_out_and_brought_in_again_is_the_same(
    uri: str, tmp_path: Path, form: str
) -> None:
    out, other = tmp_path / "new/out", tmp_path / "other"
    told = run("export", uri, "--to", out, "--format", form, "--max-file", "100B")
    came = run("import", out, other, "--step", 7, "--max-shard", "64B")

    assert digest_of(str(other)) == digest_of(uri)
    assert told["tensors"] == came["tensors"] == 5
    assert came["format"] == form
    assert came["shards"] >= 2
    assert holdfast("checkpoint", "verify", str(other)).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other", "store"]


def test_torch_reads_what_was_taken_out_for_it(uri: str, tmp_path: Path) -> None:
    run("export", uri, "--step", "10@1", "--to", tmp_path / "out", "--format", "dcp")
    found = emptied(STATE)
    torch_dcp.load(found, storage_reader=torch_dcp.FileSystemReader(tmp_path / "out"))

    assert torch.equal(found["model"]["w"], STATE["model"]["w"])
    assert torch.equal(found["model"]["half"], STATE["model"]["half"])
    assert found["optim"] == STATE["optim"]


def test_safetensors_reads_what_was_taken_out_and_an_index_says_where(
    uri: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("export", uri, "--to", out, "--format", "safetensors", "--max-file", "100B")
    index = json.loads((out / transfer.INDEX).read_text())
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}

    assert len(files) > 1
    for name, file in index["weight_map"].items():
        expected = STATE["model"][name.removeprefix("model.")]
        assert torch.equal(files[file][name].float(), expected.float())
        assert files[file][name].dtype == expected.dtype
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in STATE["model"].values())


def test_what_torch_saved_is_brought_in_and_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save(STATE, storage_writer=torch_dcp.FileSystemWriter(folder, thread_count=2))
    run("import", folder, tmp_path / "store", "--step", 3)
    again = tmp_path / "again"
    run("export", tmp_path / "store", "--to", again, "--format", "dcp")
    found = emptied(STATE)
    torch_dcp.load(found, storage_reader=torch_dcp.FileSystemReader(again))

    assert torch.equal(found["model"]["w"], STATE["model"]["w"])
    assert found["optim"] == STATE["optim"]


def test_what_ranks_saved_that_did_not_confer_is_put_together(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save(STATE, storage_writer=torch_dcp.FileSystemWriter(folder), use_collectives=False)
    assert not (folder / ".metadata").exists()

    assert run("import", folder, tmp_path / "store", "--step", 3)["tensors"] == 5


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/holdfast-was-here",)


def test_metadata_that_would_run_something_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save(STATE, storage_writer=torch_dcp.FileSystemWriter(folder))
    (folder / ".metadata").write_bytes(pickle.dumps({"x": Evil()}))

    said = run("import", folder, tmp_path / "store", "--step", 3, code=2)

    assert "pickle asks for posix.system" in said
    assert not Path("/tmp/holdfast-was-here").exists()  # noqa: S108 - where it would be
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", ForbiddenPickleError),
        (b"ctorch.serialization\nload\n.", ForbiddenPickleError),
        (b"ctorch\nload\n.", ForbiddenPickleError),
        (b"\x80\x02Uhello" + b"r\xff\xff\xff\xff.", ForeignFormatError),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60), ForeignFormatError),
        (b"Pabc\n.", ForbiddenPickleError),
        (b"", ForeignFormatError),
        (b"not a pickle", ForeignFormatError),
        (b"(" * 100_000 + b".", ForeignFormatError),
        (b"}N" + b"2\x86" * 60 + b"Ns.", ForeignFormatError),
        (b"\x80\x04}N" + b"q\x00h\x00\x86" * 60 + b"Ns.", ForeignFormatError),
        (b"\x80\x04}N" + b"2\x86Nb" * 60 + b"Ns.", ForeignFormatError),
        (b"}" + pickle.dumps(1 << 5000)[2:-1] + b"Ns.", ForeignFormatError),
    ],
)
def test_any_other_pickle_is_refused(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error, match=r": here$"):
        distcp.unpickled(data, "here")


def test_a_list_that_holds_others_many_times_over_is_refused_in_few_words(tmp_path: Path) -> None:
    # Each list has the last one twice.
    lists = b"]" + b"".join(b"q%c](h%ch%ce" % (n, n, n) for n in range(60))
    (tmp_path / ".metadata").write_bytes(lists + b".")

    with pytest.raises(ForeignFormatError, match="a list is no Metadata"):
        distcp.described(tmp_path)


def test_a_name_of_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save(STATE, storage_writer=torch_dcp.FileSystemWriter(folder))
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"/etc/os-rele"))

    with pytest.raises(ForeignFormatError, match="expected one in the folder itself"):
        distcp.described(folder)


@pytest.mark.parametrize("break_it", ["cut off", "not there"])
def test_a_folder_of_torch_that_is_not_whole_is_damaged(tmp_path: Path, break_it: str) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save(STATE, storage_writer=torch_dcp.FileSystemWriter(folder))
    file = folder / "__0_0.distcp"
    if break_it == "cut off":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()

    said = run("import", folder, tmp_path / "store", "--step", 3, code=6)

    assert str(file) in said
    assert not (tmp_path / "store").exists()


def test_an_item_that_is_not_what_metadata_says_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save({"t": torch.ones(3)}, storage_writer=torch_dcp.FileSystemWriter(folder))
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:40] + bytes(file.stat().st_size - 40))

    assert "item does not decode" in run("import", folder, tmp_path / "s", "--step", 3, code=6)
    assert Catalog(LocalStore(tmp_path / "s")).commits() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[:4],
        lambda data: struct.pack("<Q", 1 << 60) + data[8:],
        lambda data: data.replace(b'"F32"', b'"F99"'),
        lambda data: data.replace(b"[3]", b"[4]"),
        lambda data: data.replace(b"[3]", b"[-]"),
    ],
)
def test_a_file_of_safetensors_that_is_not_whole_is_damaged(tmp_path: Path, change: Any) -> None:
    folder = tmp_path / "st"
    folder.mkdir()
    path = folder / "model.safetensors"
    save_file({"t": torch.ones(3)}, path)
    path.write_bytes(change(path.read_bytes()))

    run("import", folder, tmp_path / "store", "--step", 3, code=6)

    assert not (tmp_path / "store").exists()


def test_a_file_in_which_two_tensors_have_the_same_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "st").mkdir()
    path = tmp_path / "st" / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4), "none": torch.empty(0)}, path)
    data = path.read_bytes()
    run("import", tmp_path / "st", tmp_path / "whole", "--step", 3)
    path.write_bytes(data.replace(b"[16,32]", b"[12,28]"))

    said = run("import", tmp_path / "st", tmp_path / "store", "--step", 3, code=6)

    assert "'a' and 'b' have bytes in common" in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "model.safetensors.index.json", ".metadata"])
def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "st").mkdir()
    save_file({"t": torch.ones(3)}, tmp_path / "st" / "model.safetensors")
    os.mkfifo(tmp_path / "st" / name)

    said = run("import", tmp_path / "st", tmp_path / "store", "--step", 3, code=6)

    assert f"neither file nor folder: {tmp_path / 'st' / name}" in said


def test_a_set_of_which_a_file_is_missing_is_damaged(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("export", uri, "--to", out, "--max-file", "100B")
    min(out.glob("*.safetensors")).unlink()

    assert "1 files of 2 are there" in run("import", out, tmp_path / "s", "--step", 1, code=6)
    max(out.glob("*.safetensors")).rename(out / "a.safetensors")
    assert "tensors that no file has" in run("import", out, tmp_path / "s", "--step", 1, code=6)


@pytest.mark.parametrize("form", ["dcp", "safetensors"])
def test_a_damaged_checkpoint_is_not_taken_out_and_leaves_nothing(
    uri: str, tmp_path: Path, form: str
) -> None:
    path = Path(uri) / body_key(10, 1, 1)
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)

    said = run("export", uri, "--to", tmp_path / "out", "--format", form, code=6)

    assert body_key(10, 1, 1) in said
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_target_that_is_there_is_refused_and_stays(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    assert "something is there already" in run("export", uri, "--to", out, code=2)
    assert list(out.iterdir()) == []
    run("import", uri, tmp_path / "s", "--step", 1, code=2)  # a store is no such folder
    run("export", uri, "--to", tmp_path / "x", "--format", "npz", code=2)
    run("export", uri, "--to", tmp_path / "x", "--max-file", "5", code=2)
    run("export", uri, "--to", tmp_path / "x", "--step", "11", code=2)


def test_a_store_of_another_run_or_with_that_step_is_refused(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("export", uri, "--to", out)

    assert "checkpoints of run dcp, expected b" in run(
        "import", out, uri, "--step", 11, "--run", "b", code=2
    )
    assert "checkpoint of step 10 already" in run("import", out, uri, "--step", 10, code=2)
    assert run("import", out, uri, "--step", 5)["checkpoint"] == "5@2"


def test_an_import_that_is_killed_commits_nothing(uri: str, tmp_path: Path) -> None:
    run("export", uri, "--to", tmp_path / "out")
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


def test_numbers_of_another_type_than_metadata_says_are_damaged(tmp_path: Path) -> None:
    folder = changed(tmp_path, torch.ones(3, dtype=torch.int8), b"\x04int8", b"\x04bool")

    said = run("import", folder, tmp_path / "s", "--step", 3, code=6)

    assert "item is torch.int8 of shape (3,), metadata says BOOL" in said
    assert Catalog(LocalStore(tmp_path / "s")).commits() == []


def changed(tmp_path: Path, tensor: Tensor, old: bytes, new: bytes) -> Path:
    """Save a tensor as torch does, with other bytes in the metadata."""
    folder = tmp_path / "dcp"
    torch_dcp.save({"t": tensor}, storage_writer=torch_dcp.FileSystemWriter(folder))
    path = folder / ".metadata"
    data = path.read_bytes()
    assert old in data
    # Without the frame, whose length would no longer be right.
    path.write_bytes(data[:2] + data[11:].replace(old, new))
    return folder


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"\x89t\x94b", b"\x89t\x940)b", "tuple index out of range"),
        (b"h!K\x00\x85", b"h!K\x01\x85", "is not inside"),
        (b"h!K\x03\x85", b"h!K\x02\x85", "2 of 3 elements are there: t"),
        (b"h\x07h\x07\x85", b"h\x07" + b"]" * 9999 + b"a" * 9998, "path of 't' is a list"),
    ],
)
def test_metadata_that_contradicts_itself_is_damaged(
    tmp_path: Path, old: bytes, new: bytes, said: str
) -> None:
    folder = changed(tmp_path, torch.ones(3), old, new)

    assert said in run("import", folder, tmp_path / "s", "--step", 3, code=6)


def test_a_value_that_torch_stumbles_over_is_refused_by_name() -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02h\x05.")
        archive.writestr("archive/version", b"3")

    with pytest.raises(UnstorableError, match=r": the name$"):
        value_of(data, "the name")


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

    assert "no room for" in run("export", uri, "--to", tmp_path / "out", code=1)
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

    run("import", tmp_path / "in", tmp_path / "store", "--step", 3)
    run("export", tmp_path / "store", "--to", tmp_path / "out")

    (file,) = (tmp_path / "out").glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001", "model"])
def test_what_one_rank_held_is_not_taken_for_whole_tensors(tmp_path: Path, name: str) -> None:
    """Rows 5 to 9 of ten: the file itself says that it has five, and where they belong."""
    (tmp_path / "in").mkdir()
    at = 0 if name.startswith("shard") else 5
    places = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [at, 0]}})}
    save_file({"w": torch.ones(5, 6)}, tmp_path / f"in/{name}.safetensors", places)

    said = run("import", tmp_path / "in", tmp_path / "store", "--step", 3, code=2)

    assert f"what one rank held, and maybe pieces of tensors: {tmp_path}/in/{name}" in said
    assert "enable_consolidation=True" in said
    assert not (tmp_path / "store").exists()


def test_a_tensor_that_is_called_as_the_header_of_safetensors_is_exported_as_dcp_alone(
    tmp_path: Path,
) -> None:
    saved(LocalStore(tmp_path / "store"), {"__metadata__": torch.ones(2)}, 1, ranks=1)
    out = tmp_path / "out"

    said = run("export", tmp_path / "store", "--to", out, code=1)
    assert "safetensors keep this name for themselves: __metadata__" in said
    assert not out.exists()

    run("export", tmp_path / "store", "--to", out, "--format", "dcp")
    found = {"__metadata__": torch.zeros(2)}
    torch_dcp.load(found, storage_reader=torch_dcp.FileSystemReader(out))
    assert found["__metadata__"].sum() == 2

    (tmp_path / "in").mkdir()
    save_file({"__metadata__": torch.ones(2), "w": torch.ones(2)}, tmp_path / "in/w.safetensors")
    said = run("import", tmp_path / "in", tmp_path / "other", "--step", 1, code=6)
    assert "JSON is not as expected" in said


def test_places_that_are_no_places_are_damage(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(5)}, tmp_path / "in/w.safetensors", {"DCP_SHARDING_INFO": "[5]"})

    said = run("import", tmp_path / "in", tmp_path / "store", "--step", 3, code=6)

    assert "JSON is not as expected" in said


def test_metadata_of_a_rank_that_is_missing_is_noticed(tmp_path: Path) -> None:
    for rank in (0, 2):
        (tmp_path / f"__{rank}.metadata").write_bytes(b"")

    with pytest.raises(ForeignFormatError, match="metadata of a rank is missing"):
        distcp.described(tmp_path)


def test_a_set_without_an_index_of_which_a_file_is_missing_is_damaged(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ForeignFormatError, match="1 files of 2 are there: model"):
        transfer.parts_of_safetensors(tmp_path)

    save_file({"b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    assert len(transfer.parts_of_safetensors(tmp_path)[0]) == 2


def test_a_shape_of_very_many_sizes_is_refused_at_once_and_in_few_words(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1 << 62] * 80_000, "data_offsets": [0, 4]}
    header = json.dumps({"t": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    since = time.process_time()

    with pytest.raises(ForeignFormatError) as caught:
        transfer.parts_of_safetensors(tmp_path)

    assert time.process_time() - since < 2
    assert len(str(caught.value)) < 1000
