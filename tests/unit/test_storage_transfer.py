"""Checkpoints go to folders of other formats and come back the same, and nothing of them is run."""

import json
import os
import pickle
import struct
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
from storage.catalog import Catalog
from storage.contents import read_contents
from storage.digest import combine, partial_digest, render
from storage.errors import ForbiddenPickleError, ForeignFormatError
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
    ],
)
def test_any_other_pickle_is_refused(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error, match=r": here$"):
        distcp.unpickled(data, "here")


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


def test_a_set_of_which_a_file_is_missing_is_damaged(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("export", uri, "--to", out, "--max-file", "100B")
    min(out.glob("*.safetensors")).unlink()

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
