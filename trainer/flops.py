"""How much arithmetic a step is, and how much of what a device could do that is (MFU). No torch."""

from __future__ import annotations

from trainer.config import ModelConfig

PEAKS_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200", 989.5),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.5),
    ("H20", 148.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("MI300X", 1307.4),
)
"""Products of dense bf16 matrices, 1e12 operations per second, by a part of the device's name; the
first that fits counts. Source: data sheets, without sparsity."""


def train_flops(config: ModelConfig, tokens: int, pairs: int) -> float:
    """Return the operations that training on some tokens takes, forward and backward.

    6 for each token and each parameter that is multiplied with: of the layers and of the head, not
    of the embedding, which is looked up. And 12 x heads x head width for each layer and each pair
    of tokens that look at each other: with causal attention within documents that is at most half
    of sequence length squared. What is computed a second time to save memory does not count.

    Args:
        config: sizes of the model.
        tokens: how many tokens.
        pairs: how many pairs of them look at each other (documents.pairs).

    Source: arXiv 2204.02311, appendix B, with pairs counted instead of assumed.
    """
    head, gains = config.vocab * config.dim, (2 * config.layers + 1) * config.dim
    multiplied = config.parameters - head - gains
    attention = 12.0 * config.layers * config.heads * config.head_dim * pairs
    return 6.0 * multiplied * tokens + attention


def peak_tflops(device: str) -> float | None:
    """Return what a device of this name could do with dense bf16 matrices; None if unknown."""
    for name, peak in PEAKS_TFLOPS:
        if name in device:
            return peak
    return None
