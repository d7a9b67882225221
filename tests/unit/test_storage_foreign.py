"""Folders of other formats that are damaged or would run something are refused, by name."""

import io
import json
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file
from torch import Tensor

from storage import distcp, transfer
from storage.catalog import Catalog
from storage.dcp.items import value_of
from storage.errors import ForbiddenPickleError, ForeignFormatError, UnstorableError
from storage.local import LocalStore
from tests.states import VARIED
from tests.tiers import moved

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/holdfast-was-here",)


def test_metadata_that_would_run_something_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save(VARIED, storage_writer=torch_dcp.FileSystemWriter(folder))
    (folder / ".metadata").write_bytes(pickle.dumps({"x": Evil()}))

    said = moved("import", folder, tmp_path / "store", "--step", 3, code=2)

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
    torch_dcp.save(VARIED, storage_writer=torch_dcp.FileSystemWriter(folder))
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"/etc/os-rele"))

    with pytest.raises(ForeignFormatError, match="expected one in the folder itself"):
        distcp.described(folder)


@pytest.mark.parametrize("break_it", ["cut off", "not there"])
def test_a_folder_of_torch_that_is_not_whole_is_damaged(tmp_path: Path, break_it: str) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save(VARIED, storage_writer=torch_dcp.FileSystemWriter(folder))
    file = folder / "__0_0.distcp"
    if break_it == "cut off":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()

    said = moved("import", folder, tmp_path / "store", "--step", 3, code=6)

    assert str(file) in said
    assert not (tmp_path / "store").exists()


def test_an_item_that_is_not_what_metadata_says_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save({"t": torch.ones(3)}, storage_writer=torch_dcp.FileSystemWriter(folder))
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:40] + bytes(file.stat().st_size - 40))

    assert "item does not decode" in moved("import", folder, tmp_path / "s", "--step", 3, code=6)
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

    moved("import", folder, tmp_path / "store", "--step", 3, code=6)

    assert not (tmp_path / "store").exists()


def test_a_file_in_which_two_tensors_have_the_same_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "st").mkdir()
    path = tmp_path / "st" / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4), "none": torch.empty(0)}, path)
    data = path.read_bytes()
    moved("import", tmp_path / "st", tmp_path / "whole", "--step", 3)
    path.write_bytes(data.replace(b"[16,32]", b"[12,28]"))

    said = moved("import", tmp_path / "st", tmp_path / "store", "--step", 3, code=6)

    assert "'a' and 'b' have bytes in common" in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "model.safetensors.index.json", ".metadata"])
def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "st").mkdir()
    save_file({"t": torch.ones(3)}, tmp_path / "st" / "model.safetensors")
    os.mkfifo(tmp_path / "st" / name)

    said = moved("import", tmp_path / "st", tmp_path / "store", "--step", 3, code=6)

    assert f"neither file nor folder: {tmp_path / 'st' / name}" in said


def test_numbers_of_another_type_than_metadata_says_are_damaged(tmp_path: Path) -> None:
    folder = changed(tmp_path, torch.ones(3, dtype=torch.int8), b"\x04int8", b"\x04bool")

    said = moved("import", folder, tmp_path / "s", "--step", 3, code=6)

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

    assert said in moved("import", folder, tmp_path / "s", "--step", 3, code=6)


def test_a_value_that_torch_stumbles_over_is_refused_by_name() -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02h\x05.")
        archive.writestr("archive/version", b"3")

    with pytest.raises(UnstorableError, match=r": the name$"):
        value_of(data, "the name")


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001", "model"])
def test_what_one_rank_held_is_not_taken_for_whole_tensors(tmp_path: Path, name: str) -> None:
    """Rows 5 to 9 of ten: the file itself says that it has five, and where they belong."""
    (tmp_path / "in").mkdir()
    at = 0 if name.startswith("shard") else 5
    places = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [at, 0]}})}
    save_file({"w": torch.ones(5, 6)}, tmp_path / f"in/{name}.safetensors", places)

    said = moved("import", tmp_path / "in", tmp_path / "store", "--step", 3, code=2)

    assert f"what one rank held, and maybe pieces of tensors: {tmp_path}/in/{name}" in said
    assert "enable_consolidation=True" in said
    assert not (tmp_path / "store").exists()


def test_places_that_are_no_places_are_damage(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(5)}, tmp_path / "in/w.safetensors", {"DCP_SHARDING_INFO": "[5]"})

    said = moved("import", tmp_path / "in", tmp_path / "store", "--step", 3, code=6)

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
