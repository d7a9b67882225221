"""Sizes of the Llama 3 family, and how many parameters follow from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

Shape = tuple[int, ...]
LAYERS_MAX = 100_000
"""Each is looked at by itself when a model is cut or counted."""


class RopeScaling(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """How Llama 3.1 stretches rotary embedding to sequences longer than it was pre-trained on.

    Wavelengths above `original_length / low_freq_factor` get `factor` times as long, those below
    `original_length / high_freq_factor` stay, and what lies between is blended.

    Source: the reference code of Llama 3.1; the defaults are its values for 8B, 70B and 405B.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    """Positions that the model knew before, in tokens."""


class ModelConfig(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """Sizes of one model, named as in the run file (camelCase).

    Source: arXiv 2407.21783, table 3; feed-forward widths from the released `params.json`.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab: int = 128_256
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    rope_scaling: RopeScaling | None = None
    max_length: int = 131_072
    """Tokens of the longest sequence that it is trained on. Source: arXiv 2407.21783, 3.4.2."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.kv_heads * self.head_dim
        return attention + 3 * self.dim * self.ffn_dim + 2 * self.dim

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, embedding and untied head included."""
        return self.layers * self.layer_parameters + 2 * self.vocab * self.dim + self.dim

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that differ whenever a size does; marks checkpoints."""
        sizes = msgspec.to_builtins(self)
        del sizes["maxLength"]  # no weight depends on it
        if self.rope_scaling is None:
            # As it was before there was such a choice: checkpoints of then are still ours.
            del sizes["ropeScaling"]
        return hashlib.sha256(msgspec.json.encode(sizes)).hexdigest()[:16]


PRESETS: dict[str, ModelConfig] = {
    "debug": ModelConfig(dim=128, layers=4, heads=4, kv_heads=2, ffn_dim=384, vocab=1280),
    "8B": ModelConfig(dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14_336),
    "70B": ModelConfig(dim=8192, layers=80, heads=64, kv_heads=8, ffn_dim=28_672),
    "405B": ModelConfig(dim=16_384, layers=126, heads=128, kv_heads=8, ffn_dim=53_248),
}


def misfits(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield what does not fit together in sizes, each as message and hint."""
    sizes = (
        config.dim,
        config.layers,
        config.heads,
        config.kv_heads,
        config.ffn_dim,
        config.vocab,
        config.max_length,
    )
    if min(sizes) < 1:
        yield f"a size is {min(sizes)}", "sizes are at least 1"
        return
    if config.layers > LAYERS_MAX:
        yield f"layers is {config.layers}, expected at most {LAYERS_MAX}", "405B has 126"
    if config.rope_theta <= 0 or config.norm_eps <= 0:
        found = f"ropeTheta is {config.rope_theta:g} and normEps {config.norm_eps:g}"
        yield f"{found}, expected both above 0", "Llama 3: ropeTheta 500000, normEps 1e-5"
    if config.dim % (2 * config.heads):
        yield (
            f"dim is {config.dim}, expected a multiple of 2 x heads = {2 * config.heads}",
            "rotary embedding turns pairs within each head",
        )
    if config.heads % config.kv_heads:
        yield (
            f"heads is {config.heads}, expected a multiple of kvHeads = {config.kv_heads}",
            "each key-value head serves the same number of query heads",
        )
    scaling = config.rope_scaling
    if scaling is not None and not (
        scaling.factor >= 1
        and 0 < scaling.low_freq_factor < scaling.high_freq_factor
        and scaling.original_length >= 1
    ):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        message = (
            f"ropeScaling has factor {scaling.factor:g}, lowFreqFactor {low:g}, "
            f"highFreqFactor {high:g} and originalLength {scaling.original_length}, expected "
            "0 < lowFreqFactor < highFreqFactor, and the others to be at least 1"
        )
        yield message, "Llama 3.1: factor 8, lowFreqFactor 1, highFreqFactor 4, originalLength 8192"


def weight_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Yield our name and the shape of every weight, in the order in which they are used."""
    dim, ffn, keys = config.dim, config.ffn_dim, config.kv_heads * config.head_dim
    yield "embedding.weight", (config.vocab, dim)
    for n in range(config.layers):
        yield f"layers.{n}.attention_norm.weight", (dim,)
        yield f"layers.{n}.attention.wq.weight", (dim, dim)
        yield f"layers.{n}.attention.wk.weight", (keys, dim)
        yield f"layers.{n}.attention.wv.weight", (keys, dim)
        yield f"layers.{n}.attention.wo.weight", (dim, dim)
        yield f"layers.{n}.ffn_norm.weight", (dim,)
        yield f"layers.{n}.ffn.w1.weight", (ffn, dim)
        yield f"layers.{n}.ffn.w2.weight", (dim, ffn)
        yield f"layers.{n}.ffn.w3.weight", (ffn, dim)
    yield "norm.weight", (dim,)
    yield "head.weight", (config.vocab, dim)


def cut_dimension(name: str) -> int | None:
    """Return along which dimension tensor parallelism cuts a weight; None if each rank has all.

    So does Meta's release, which is in as many parts. Source: its reference model.
    """
    if "norm" in name:
        return None
    return 1 if name.endswith((".attention.wo.weight", ".ffn.w2.weight")) else 0
