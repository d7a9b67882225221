"""Public weights come in and go out; whatever is wrong with them is said in one line."""

import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.worker import MisconfiguredError
from tests.weights import (
    STRETCHED,
    TINY,
    assert_same,
    loaded,
    model_of,
    run_folder,
    weights_of,
    written,
)
from trainer.config import PRESETS, ModelConfig
from trainer.job import Job, read_job
from trainer.model import Llama
from trainer.weights import names
from trainer.weights.__main__ import main
from trainer.weights.convert import convert
from trainer.weights.machine import tensors_of
from trainer.weights.sources import ffn_dim, open_weights
from trainer.weights.stored import halves, neighbours

torch.set_num_threads(1)


def refused(path: Path | str) -> MisconfiguredError:
    with pytest.raises(MisconfiguredError) as caught:
        loaded(open_weights(str(path)))
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("config", [TINY, PRESETS["8B"], PRESETS["405B"]])
def test_names_and_shapes_are_those_of_the_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Llama(config)

    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert dict(names.shapes(config)) == expected


@pytest.mark.parametrize("size", ["8B", "70B", "405B"])
def test_the_folder_of_a_published_size_is_opened_without_reading_it(
    size: str, tmp_path: Path
) -> None:
    config = PRESETS[size]
    at, table = 0, {}
    for name, shape in names.shapes(config):
        end = at + 2 * math.prod(shape)
        theirs = names.HUGGING_FACE.theirs(name)
        table[theirs] = {"dtype": "BF16", "shape": shape, "data_offsets": (at, end)}
        at = end
    head = json.dumps(table).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + at)  # sparse: 810 GB of nothing
    sizes = {
        "hidden_size": config.dim, "num_hidden_layers": config.layers, "vocab_size": 128_256,
        "num_attention_heads": config.heads, "num_key_value_heads": 8, "model_type": "llama",
        "intermediate_size": config.ffn_dim, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))

    weights = open_weights(str(tmp_path))

    weights.require(config)
    assert weights.parameters == config.parameters
    last = config.layers - 1
    part = weights.read(f"layers.{last}.attention.wk.weight", (192, 0), (64, config.dim))
    assert part.shape == (64, config.dim)


@pytest.mark.parametrize("file_bytes", [1 << 30, 20_000])
def test_the_layout_of_hugging_face_goes_out_and_comes_back(
    file_bytes: int, tmp_path: Path
) -> None:
    model = written(tmp_path / "out", config=STRETCHED, file_bytes=file_bytes)

    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert ("model.safetensors.index.json" in files) is (file_bytes < 1 << 30)
    weights = open_weights(str(tmp_path / "out"))
    assert weights.config == STRETCHED
    assert_same(loaded(weights), model)
    theirs = {
        k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()
    }
    assert sum(tensor.numel() for tensor in theirs.values()) == STRETCHED.parameters


@pytest.mark.parametrize("parts", [1, 2])
def test_the_layout_of_meta_goes_out_is_read_by_torch_and_comes_back(
    parts: int, tmp_path: Path
) -> None:
    model = written(tmp_path / "out", "meta", STRETCHED, parts=parts)

    weights = open_weights(str(tmp_path / "out"))
    assert weights.config == STRETCHED
    assert_same(loaded(weights), model)
    files = sorted((tmp_path / "out").glob("*.pth"))
    read = [torch.load(file, weights_only=True) for file in files]
    assert len(read) == parts
    joined = torch.cat([part["layers.1.feed_forward.w2.weight"] for part in read], dim=1)
    assert torch.equal(joined, model.get_parameter("layers.1.ffn.w2.weight"))
    joined = torch.cat([part["tok_embeddings.weight"] for part in read])
    assert torch.equal(joined, model.get_parameter("embedding.weight"))


def test_what_torch_saves_is_read_as_it_is(tmp_path: Path) -> None:
    model = written(tmp_path / "out", "meta")
    state = torch.load(tmp_path / "out/consolidated.00.pth", weights_only=True)
    # A module's own state has attributes; parameters and views into one storage are pickled too.
    module = torch.nn.Module()
    module.register_parameter("x", torch.nn.Parameter(torch.ones(2)))
    kept = module.state_dict(keep_vars=True)
    del kept["x"]
    both = torch.cat([state["norm.weight"], state["layers.0.ffn_norm.weight"]])
    kept.update({name: torch.nn.Parameter(tensor) for name, tensor in state.items()})
    kept.update({"norm.weight": both[:32], "layers.0.ffn_norm.weight": both[32:]})
    kept["rope.freqs"] = torch.ones(4)
    torch.save(kept, tmp_path / "out/consolidated.00.pth")

    assert_same(loaded(open_weights(str(tmp_path / "out"))), model)


@pytest.mark.parametrize(("shards", "shared"), [(1, "-"), (3, "-"), (2, "norm")])
def test_a_run_s_checkpoint_is_read_whatever_number_of_shards_it_has(
    shards: int, shared: str, tmp_path: Path
) -> None:
    model = model_of()
    folder = run_folder(tmp_path / "run", model, shards=shards, shared=shared)

    for address in (folder, folder / "checkpoints", f"{folder}@7"):
        weights = open_weights(str(address))
        assert_same(loaded(weights), model)
        assert "checkpoint of step 7" in weights.layout
    assert "steps 7" in refused(f"{folder}@8").hint
    written(folder / "exported")
    assert open_weights(str(folder / "exported")).layout.startswith("Hugging Face")


def test_weights_are_read_from_where_fsspec_reaches_them(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for layout in ("hf", "meta"):
        model = written(tmp_path / layout, layout, file_bytes=30_000)
        files.put(str(tmp_path / layout), f"/weights/{layout}", recursive=True)

        assert_same(loaded(open_weights(f"memory://weights/{layout}")), model)
    files.rm("/weights", recursive=True)


def test_any_box_of_a_weight_is_that_box_of_the_whole(tmp_path: Path) -> None:
    model = written(tmp_path / "hf")
    convert(weights_of(model), tmp_path / "meta", "meta", parts=2)
    run_folder(tmp_path / "run", model)

    for layout in ("hf", "meta", "run"):
        weights = open_weights(str(tmp_path / layout))
        for name, weight in model.named_parameters():
            for first, count in ((0, 1), (5, 11), (15, 1), (16, 0)):
                offset = (first, 3)[: weight.ndim]
                shape = (count, 9)[: weight.ndim]
                box = weight[first : first + count]
                box = box if weight.ndim == 1 else box[:, 3:12]
                assert torch.equal(weights.read(name, offset, shape), box), (layout, name)


def test_heads_turned_by_halves_become_neighbours_and_back() -> None:
    rows = torch.arange(16.0)[:, None]

    turned = neighbours(rows, 8)

    assert turned[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(halves(turned, 8), rows)


def test_a_head_that_is_the_embedding_is_read_as_a_copy_of_it(tmp_path: Path) -> None:
    model = written(tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    change_json(tmp_path / "out/config.json", tie_word_embeddings=True)

    weights = open_weights(str(tmp_path / "out"))

    assert weights.tied
    assert weights.parameters == TINY.parameters - TINY.vocab * TINY.dim
    embedding = model.get_parameter("embedding.weight")
    assert torch.equal(weights.read("head.weight"), embedding)
    assert torch.equal(weights.read("embedding.weight"), embedding)


def test_published_feed_forward_widths_follow_from_what_params_json_says() -> None:
    assert [
        ffn_dim(4096, 1.3, 1024), ffn_dim(8192, 1.3, 4096), ffn_dim(16_384, 1.2, 4096)
    ] == [PRESETS[size].ffn_dim for size in ("8B", "70B", "405B")]  # fmt: skip


def test_a_small_release_that_does_not_say_how_far_it_is_stretched_is_refused(
    tmp_path: Path,
) -> None:
    written(tmp_path / "out", "meta", STRETCHED)
    change_json(tmp_path / "out/params.json", rope_scaling_factor=None)

    assert "use_scaled_rope without rope_scaling_factor" in str(refused(tmp_path / "out"))


def test_the_digest_changes_with_the_content_and_not_with_the_place(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        convert(weights_of(model_of(seed=seed)), tmp_path / name, "hf")

    one, same, other = (open_weights(str(tmp_path / n)).digest for n in ("one", "same", "other"))

    assert one == same != other


def test_weights_in_half_the_bits_are_those_of_the_model_rounded(tmp_path: Path) -> None:
    model = written(tmp_path / "out", dtype=torch.bfloat16)

    read = loaded(open_weights(str(tmp_path / "out")))

    assert_same(read, model.bfloat16().float())


# What is wrong --------------------------------------------------------------------------------


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def retensor(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


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


# The command ----------------------------------------------------------------------------------


def test_the_command_shows_and_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(tmp_path / "one")

    assert main(["show", str(tmp_path / "one"), "--check"]) == 0
    assert (
        main(["convert", str(tmp_path / "one"), "--out", str(tmp_path / "two"), "--to", "meta"])
        == 0
    )
    capsys.readouterr()
    assert main(["show", str(tmp_path / "two"), "-o", "json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == TINY.parameters
    assert told["types"] == {"float32": 21}
    assert_same(loaded(open_weights(str(tmp_path / "two"))), model)


def test_a_conversion_that_fails_leaves_nothing_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "one")
    retensor(tmp_path / "one/model.safetensors", lambda t: t["lm_head.weight"].fill_(1e30))

    for more in (["--dtype", "float16"], ["--to", "meta", "--parts", "3"]):
        assert main(["convert", str(tmp_path / "one"), "--out", str(tmp_path / "two"), *more]) == 2
        assert "hint: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert main(["convert", str(tmp_path / "one"), "--out", str(tmp_path / "one")]) == 2
    assert "something is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "out", ["one/config.json/b", "nowhere/b", "b" * 250, "b" * 300, "lost", "lost/b"]
)
def test_a_place_where_no_weights_can_be_written_is_refused_with_a_hint(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "one")
    (tmp_path / "lost").symlink_to("nowhere")

    assert main(["convert", str(tmp_path / "one"), "--out", str(tmp_path / out)]) == 2

    assert "hint: " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"one", "lost"}


# A run that begins from them ------------------------------------------------------------------


def job_from(path: Path, config: ModelConfig = TINY) -> Job:
    model = msgspec.to_builtins(msgspec.structs.replace(config, vocab=1280))
    return read_job({"trainer": {"model": model, "initFrom": str(path)}}, 1)


def test_checkpoints_of_a_run_are_marked_with_the_weights_that_it_began_from(
    tmp_path: Path,
) -> None:
    config = msgspec.structs.replace(TINY, vocab=1280)
    for seed in range(2):
        convert(weights_of(model_of(config, seed), config), tmp_path / str(seed), "hf")

    first, again, other = (job_from(tmp_path / name).identity for name in "001")

    assert first == again != other
    assert first.startswith(config.fingerprint)
    assert read_job({"trainer": {"model": msgspec.to_builtins(config)}}, 1).identity == (
        config.fingerprint
    )


def test_a_run_is_not_begun_from_weights_of_another_model(tmp_path: Path) -> None:
    written(tmp_path / "out")

    with pytest.raises(MisconfiguredError) as caught:
        job_from(tmp_path / "out")

    says = "spec.trainer.initFrom: embedding.weight is of shape [512, 32], expected [1280, 32]"
    assert says in str(caught.value)
    assert "spec.trainer.model" in caught.value.hint
    with pytest.raises(MisconfiguredError, match=r"spec.trainer.initFrom: no such folder"):
        job_from(tmp_path / "nowhere")


# Averages -------------------------------------------------------------------------------------


def test_the_checkpoints_of_an_anneal_are_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [model_of(seed=seed) for seed in range(3)]
    for model, step in zip(models, (8, 9, 10), strict=True):
        run_folder(tmp_path / "run", model, step=step, annealSteps=2, steps=10)

    assert main(["average", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "mean of 2" in capsys.readouterr().out
    one_by_one = [f"{tmp_path / 'run'}@{step}" for step in (9, 10)]
    assert main(["average", *one_by_one, "--out", str(tmp_path / "same"), "--to", "meta"]) == 0

    for out in ("out", "same"):
        read = loaded(open_weights(str(tmp_path / out)))
        for name, weight in read.named_parameters():
            expected = (models[1].get_parameter(name) + models[2].get_parameter(name)) / 2
            torch.testing.assert_close(weight, expected, atol=1e-7, rtol=1e-6)


def test_what_can_not_be_averaged_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "hf")
    written(tmp_path / "other", config=STRETCHED)
    run_folder(tmp_path / "run", model_of())
    run_folder(tmp_path / "early", model_of(), step=7, annealSteps=2, steps=10)

    for sources, says in (
        (["hf"], "no run to find the checkpoints of"),
        (["run"], "spec.trainer.annealSteps is 0"),
        (["early"], "no checkpoint after step 8, at which the anneal begins"),
        (["hf", "other"], "rope_scaling of the weights is"),
    ):
        addresses = [str(tmp_path / source) for source in sources]
        assert main(["average", *addresses, "--out", str(tmp_path / "out")]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pickled_tensor_of_very_many_dimensions_is_refused_at_once(tmp_path: Path) -> None:
    program = (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
        b"K\x00(" + b"K\x02" * 30_000 + b"K\x00t(" + b"K\x00" * 30_001 + b"t\x89)tRs."
    )

    with pytest.raises(MisconfiguredError, match="30001 dimensions, expected 8 at most"):
        tensors_of(program, str(tmp_path))
