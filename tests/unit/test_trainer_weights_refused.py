"""Weights that are damaged, incomplete, of another model or no weights are refused in one line."""

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from orchestrator.worker import MisconfiguredError
from tests.weights import (
    STRETCHED,
    TINY,
    change_json,
    loaded,
    model_of,
    retensor,
    run_folder,
    written,
)
from trainer.weights.machine import tensors_of
from trainer.weights.sources import open_weights

torch.set_num_threads(1)


def refused(path: Path | str) -> MisconfiguredError:
    with pytest.raises(MisconfiguredError) as caught:
        loaded(open_weights(str(path)))
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


W = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(W), f"{W} is not there"),
        (lambda t: t.update({W: torch.ones(9, 32)}), "weight is of shape [9, 32], expected [48"),
        (lambda t: t.update(x=torch.ones(3)), "x is no weight of such a model (1 like it)"),
        (lambda t: t.update({W: torch.ones(48, 32, dtype=torch.int8)}), "dtype is 'I8', expected"),
        (lambda t: t[W].fill_(math.nan), "1536 of 1536 values are NaN or infinite, the first is"),
        (lambda t: t[W][3, 1].fill_(-math.inf), "1 of 1536 values are NaN or"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_those_of_the_model_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], object], says: str, tmp_path: Path
) -> None:
    written(tmp_path / "out")
    retensor(tmp_path / "out/model.safetensors", change)

    said = str(refused(tmp_path / "out"))

    assert says in said
    assert str(tmp_path) in said


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', expected 'llama'"),
        ({"attention_bias": True}, "attention_bias is True, expected False"),
        ({"head_dim": 16}, "head_dim is 16, expected 8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type is 'yarn'"),
        ({"num_attention_heads": 3, "head_dim": None}, "expected a multiple of 2 x heads"),
        ({"num_key_value_heads": 4}, "k_proj.weight is of shape [16, 32], expected [32"),
        ({"hidden_size": "wide"}, "Expected `int`"),
        ({"hidden_size": -1}, ">= 1"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is no weight of such"),
    ],
)  # fmt: skip
def test_a_config_of_another_model_is_refused(
    fields: dict[str, Any], says: str, tmp_path: Path
) -> None:
    written(tmp_path / "out")
    change_json(tmp_path / "out/config.json", **fields)

    assert says in str(refused(tmp_path / "out"))


def test_a_file_that_was_cut_short_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    written(tmp_path / "hf")
    written(tmp_path / "meta", "meta")
    for file in ("hf/model.safetensors", "meta/consolidated.00.pth"):
        path = tmp_path / file
        for size in (path.stat().st_size - 1, 100, 5, 0):
            os.truncate(path, size)
            assert str(path) in str(refused(path.parent))


def test_a_damaged_tensor_of_a_zip_is_found_by_its_checksum(tmp_path: Path) -> None:
    written(tmp_path / "out", "meta")
    path = tmp_path / "out/consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("consolidated/data/4").header_offset + 500
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)

    assert "crc32 of a tensor is" in str(refused(tmp_path / "out"))


def test_a_damaged_chunk_of_a_checkpoint_is_found_by_its_digest(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", model_of(), shards=1)
    (body,) = folder.rglob("*.st")
    content = bytearray(body.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    body.write_bytes(content)

    assert "xxh3-128 is" in str(refused(folder))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was-run",)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"x": Evil()}, "it names 'posix.system'"),
        (Evil(), "it names 'posix.system'"),
        ({"x": torch.nn.Linear(2, 2)}, "it names 'torch.nn.modules.linear.Linear'"),
        ([torch.ones(2)], "it is a list of 1, expected a dictionary"),
        ({"x": [torch.ones(2)]}, "'x' is a list of 1, expected a tensor"),
        ({1: torch.ones(2)}, "a key that is 1, expected a name"),
        ({"x": torch.ones(2, dtype=torch.int64)}, "is a LongStorage, expected numbers"),
        ({"x": torch.ones(4, 4).t()}, "expected row after row"),
        ({"x": torch.ones(4).to_sparse()}, "it names 'torch._utils._rebuild_sparse_tensor'"),
    ],
)
def test_a_pickle_that_is_more_than_a_dictionary_of_tensors_is_refused_and_not_run(
    state: object, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "out", "meta")
    torch.save(state, tmp_path / "out/consolidated.00.pth")

    said = str(refused(tmp_path / "out"))

    assert "pickle is refused" in said
    assert says in said
    assert not Path("was-run").exists()


def test_pickles_without_a_zip_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "out", "meta")
    (tmp_path / "out/consolidated.00.pth").write_bytes(pickle.dumps({"x": 1}))
    written(tmp_path / "bin")
    (tmp_path / "bin/model.safetensors").unlink()
    (tmp_path / "bin/pytorch_model.bin").write_bytes(pickle.dumps(Evil()))

    assert "no zip as torch.save makes it" in str(refused(tmp_path / "out"))
    assert "pickled weights are not loaded" in str(refused(tmp_path / "bin"))


def test_a_zip_of_a_version_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """Each member says which version it takes, and newer ones compress or encrypt otherwise."""
    written(tmp_path / "out", "meta")
    path = tmp_path / "out/consolidated.00.pth"
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 99
    path.write_bytes(content)

    said = str(refused(tmp_path / "out"))

    assert "no zip as torch.save makes it: zip file version 9.9" in said
    assert str(path) in said


def test_a_zip_whose_members_are_compressed_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "out", "meta")
    path = tmp_path / "out/consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(name, member)

    assert "in the file, expected as many, as they are" in str(refused(tmp_path / "out"))


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "out", "meta", parts=2)
    (tmp_path / "out/consolidated.01.pth").rename(tmp_path / "out/consolidated.02.pth")
    assert "consolidated.01.pth is not there" in str(refused(tmp_path / "out"))

    (tmp_path / "out/consolidated.02.pth").unlink()
    assert "tok_embeddings.weight is of shape [256, 32], expected [512, 32]" in str(
        refused(tmp_path / "out")
    )


def test_an_index_that_names_files_elsewhere_or_tensors_that_are_not_there_is_refused(
    tmp_path: Path,
) -> None:
    written(tmp_path / "out", file_bytes=20_000)
    index = tmp_path / "out/model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]

    change_json(index, weight_map=placed | {W: "../model.safetensors"})
    assert f"file of {W} is '../model.safetensors'" in str(refused(tmp_path / "out"))
    change_json(index, weight_map=placed | {W: "model-9.safetensors"})
    assert "no such file" in str(refused(tmp_path / "out"))
    other = next(file for file in placed.values() if file != placed[W])
    change_json(index, weight_map=placed | {W: other})
    assert f"{W} is not there, the index says it is" in str(refused(tmp_path / "out"))


def test_weights_of_another_model_are_refused_with_the_first_difference(tmp_path: Path) -> None:
    written(tmp_path / "out")
    weights = open_weights(str(tmp_path / "out"))
    replace = msgspec.structs.replace

    for config, says in (
        (replace(TINY, ffn_dim=64), "ffn.w1.weight is of shape [48, 32], expected [64, 32]"),
        (replace(TINY, layers=3), "layers.2.attention_norm.weight is not there, expected [32]"),
        (replace(TINY, heads=2, kv_heads=1), "heads of the weights is 4, expected 2"),
        (STRETCHED, "rope_scaling of the weights is None"),
    ):  # fmt: skip
        with pytest.raises(MisconfiguredError) as caught:
            weights.require(config)
        assert says in str(caught.value)
        assert "dim 32, layers 2" in caught.value.hint


@pytest.mark.parametrize(
    "address", ["", "/no/such/folder", "memory://nothing", "github://x", "a\0b"]
)
def test_an_address_without_weights_is_refused(address: str) -> None:
    refused(address)


def test_a_pickled_tensor_of_very_many_dimensions_is_refused_at_once(tmp_path: Path) -> None:
    program = (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
        b"K\x00(" + b"K\x02" * 30_000 + b"K\x00t(" + b"K\x00" * 30_001 + b"t\x89)tRs."
    )

    with pytest.raises(MisconfiguredError, match="30001 dimensions, expected 8 at most"):
        tensors_of(program, str(tmp_path))
