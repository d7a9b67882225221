"""Sizes of the Llama 3 family, and how many parameters follow from them. No torch."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from orchestrator.worker import MisconfiguredError


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

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, embedding and untied head included."""
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.kv_heads * self.head_dim
        block = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        return self.layers * block + 2 * self.vocab * self.dim + self.dim

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that differ whenever a size does; marks checkpoints."""
        text = msgspec.json.encode(self, order="deterministic")
        return hashlib.sha256(text).hexdigest()[:16]


PRESETS: dict[str, ModelConfig] = {
    "debug": ModelConfig(dim=128, layers=4, heads=4, kv_heads=2, ffn_dim=384, vocab=1280),
    "8B": ModelConfig(dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14_336),
    "70B": ModelConfig(dim=8192, layers=80, heads=64, kv_heads=8, ffn_dim=28_672),
    "405B": ModelConfig(dim=16_384, layers=126, heads=128, kv_heads=8, ffn_dim=53_248),
}


def model_config(model: str | dict[str, Any]) -> ModelConfig:
    """Return the sizes that `spec.trainer.model` asks for, checked.

    Raises:
        MisconfiguredError: if it names no preset, or its sizes do not fit each other.
    """
    where = "spec.trainer.model"
    if isinstance(model, str):
        if model not in PRESETS:
            raise MisconfiguredError(
                f"{where} is {model!r}, expected one of {', '.join(PRESETS)}",
                hint="or write the sizes themselves: {dim: 128, layers: 4, ...}",
            )
        return PRESETS[model]
    try:
        config = msgspec.convert(model, ModelConfig)
    except msgspec.ValidationError as error:
        raise MisconfiguredError(
            f"{where}: {error}", hint=f"fields: {', '.join(_names())}"
        ) from error
    _check(config, where)
    return config


def _check(config: ModelConfig, where: str) -> None:
    sizes = (config.dim, config.layers, config.heads, config.kv_heads, config.ffn_dim, config.vocab)
    if min(sizes) < 1:
        raise MisconfiguredError(f"{where}: a size is {min(sizes)}", hint="sizes are at least 1")
    if config.dim % (2 * config.heads):
        raise MisconfiguredError(
            f"{where}: dim is {config.dim}, expected a multiple of 2 x heads = {2 * config.heads}",
            hint="rotary embedding turns pairs within each head",
        )
    if config.heads % config.kv_heads:
        raise MisconfiguredError(
            f"{where}: heads is {config.heads}, expected a multiple of kvHeads = {config.kv_heads}",
            hint="each key-value head serves the same number of query heads",
        )


def _names() -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(ModelConfig)]
