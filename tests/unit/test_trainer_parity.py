"""Our model against transformers' Llama: the same weights give the same numbers.

transformers comes with the `dev` extra. Without it these tests fail, so that nobody takes a run of
the tests that compared nothing for one that did.
"""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.oracles import llama_config
from tests.weights import STRETCHED, TINY, assert_same, loaded, weights_of, written
from trainer.config import PRESETS, ModelConfig, RopeScaling
from trainer.model import next_token_loss, rope_table
from trainer.weights.convert import convert
from trainer.weights.names import HUGGING_FACE, is_rotated
from trainer.weights.sources import open_weights
from trainer.weights.stored import halves

torch.set_num_threads(1)
SCALINGS = [None, RopeScaling(), RopeScaling(factor=32.0, original_length=512)]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["as it is", "3.1", "3.2 and shorter"])
def test_rotary_angles_are_those_of_transformers(scaling: RopeScaling | None) -> None:
    config = ModelConfig(
        **{f: getattr(PRESETS["8B"], f) for f in ModelConfig.__struct_fields__}
        | {"rope_scaling": scaling}
    )
    positions = torch.arange(0, 131_072, 8191)

    cos, sin = rope_table(131_072, config.head_dim, config.rope_theta, scaling)

    expected = LlamaRotaryEmbedding(llama_config(config))(torch.empty(0), positions[None])
    half = config.head_dim // 2
    # At position 131,071 an angle has an error of 0.008 rad from rounding its frequency alone.
    for ours, theirs in zip((cos, sin), expected, strict=True):
        torch.testing.assert_close(ours[positions[:4]], theirs[0, :4, :half], atol=3e-3, rtol=0)
        torch.testing.assert_close(ours[positions], theirs[0, :, :half], atol=2e-2, rtol=0)


def tokens() -> torch.Tensor:
    return torch.randint(0, TINY.vocab, (2, 49), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [TINY, STRETCHED], ids=["as it is", "stretched"])
def test_transformers_computes_with_our_export_what_we_compute(
    config: ModelConfig, tmp_path: Path
) -> None:
    ours = written(tmp_path / "out", config=config)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    inputs, targets = tokens()[:, :-1], tokens()[:, 1:]

    logits = ours(inputs)
    loss = next_token_loss(logits, targets) / targets.numel()
    loss.backward()
    answer = theirs(input_ids=inputs, labels=None)
    their_loss = torch.nn.functional.cross_entropy(answer.logits.flatten(0, 1), targets.flatten())
    their_loss.backward()

    assert theirs.dtype == torch.float32
    torch.testing.assert_close(logits, answer.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=0)
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        gradient = weight.grad
        assert gradient is not None
        if is_rotated(name):
            gradient = halves(gradient, config.head_dim)
        torch.testing.assert_close(
            gradient, gradients.pop(HUGGING_FACE.theirs(name)), atol=1e-5, rtol=1e-5
        )
    assert not gradients


@pytest.mark.parametrize("tied", [False, True])
def test_we_compute_with_what_transformers_saved_what_it_computes(
    tied: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    settings = llama_config(STRETCHED)
    settings.tie_word_embeddings = tied
    theirs = LlamaForCausalLM(settings)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()

    weights = open_weights(str(tmp_path / "theirs"))

    assert (weights.config, weights.tied) == (STRETCHED, tied)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(weights)(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=0
        )


def test_a_model_that_went_through_every_layout_is_the_same_bits(tmp_path: Path) -> None:
    model = written(tmp_path / "1", "meta", parts=2)
    convert(open_weights(str(tmp_path / "1")), tmp_path / "2", "hf", file_bytes=30_000)
    LlamaForCausalLM.from_pretrained(tmp_path / "2").save_pretrained(tmp_path / "3")

    assert_same(loaded(open_weights(str(tmp_path / "3"))), model)
    convert(weights_of(model), tmp_path / "4", "hf", file_bytes=30_000)
    for path in (tmp_path / "2").iterdir():
        assert (tmp_path / "4" / path.name).read_bytes() == path.read_bytes()
