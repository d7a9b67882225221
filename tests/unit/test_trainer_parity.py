"""Our model against transformers' Llama: the same weights give the same numbers.

transformers comes with the `dev` extra. Without it these tests fail, so that nobody takes a run of
the tests that compared nothing for one that did.
"""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.oracles import llama_config
from trainer.config import PRESETS, ModelConfig, RopeScaling
from trainer.model import rope_table

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
