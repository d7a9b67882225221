"""Public weights come in and go out; whatever is wrong with them is said in one line."""

import json
import math
import struct
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.worker import MisconfiguredError
from tests.weights import (
    STRETCHED,
    TINY,
    assert_same,
    change_json,
    loaded,
    model_of,
    run_folder,
    weights_of,
    written,
)
from trainer.config import PRESETS, ModelConfig
from trainer.model import Llama
from trainer.weights import names
from trainer.weights.convert import convert
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
