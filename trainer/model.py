"""The Llama 3 decoder, top to bottom: norm, rope, attention, mlp, block, model.

Letters in array names: B batch, L sequence length, D model width, H query heads, K key-value
heads, E head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from trainer.config import ModelConfig, RopeScaling
from trainer.documents import Cuts, attend, looking, positions_of, sent
from trainer.embedding import Embedding


class RMSNorm(nn.Module):
    """Scales each vector to unit root mean square, then by a learned gain per component."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the normed vectors, same shape and type; computed in float32."""
        x = x_BLD.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x.type_as(x_BLD) * self.weight


def rope_table(
    length: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position and frequency, each of shape [L, E / 2]."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is not None:
        frequency = _stretched(frequency, scaling)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def _stretched(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    # How often a component turns within the length that the model was pre-trained on.
    turns = scaling.original_length * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * frequency / scaling.factor + kept * frequency


def rotate(x_BLHE: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
    """Turn neighbouring components (0, 1), (2, 3), ... of each head by their position's angle.

    Angles are those of all sequences, [L, E / 2], or of each its own, [B, L, E / 2].
    """
    cos, sin = cos_LE.unsqueeze(-2), sin_LE.unsqueeze(-2)
    pairs = x_BLHE.float().reshape(*x_BLHE.shape[:-1], -1, 2)
    if pairs.device.type == "cpu" and pairs.shape[-2] % 8 == 0:
        # The same products and sums, and the same bits, in a tenth of the time: a CPU is slow to
        # take every other number. Of fewer than eight it would round the two products as one, and
        # compilers for GPUs know nothing of complex numbers.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    else:
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x_BLHE)


class Attention(nn.Module):
    """Grouped-query causal attention that does not look across document borders.

    Attributes:
        attend: as `documents.attend`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attend: Callable[..., Tensor] = attend
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.heads * self.head_dim, config.dim, bias=False)

    def forward(
        self, x_BLD: Tensor, rope: tuple[Tensor, Tensor], documents: Cuts | BlockMask | None
    ) -> Tensor:
        """Return the mixed vectors, shape [B, L, D]; `documents` as in `documents.attend`."""
        q_BLHE = rotate(self.wq(x_BLD).unflatten(-1, (self.heads, self.head_dim)), *rope)
        k_BLKE = rotate(self.wk(x_BLD).unflatten(-1, (self.kv_heads, self.head_dim)), *rope)
        v_BLKE = self.wv(x_BLD).unflatten(-1, (self.kv_heads, self.head_dim))
        q, k, v = (t.transpose(1, 2) for t in (q_BLHE, k_BLKE, v_BLKE))
        mixed = self.attend(q, k, v, documents)
        return self.wo(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return shape [B, L, D]."""
        return self.w2(F.silu(self.w1(x_BLD)) * self.w3(x_BLD))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added after.

    Attributes:
        recompute: what the backward pass computes again instead of having it kept: `none`;
            `selective`, the feed-forward, whose vectors are the widest; `full`, the whole layer,
            of which only what goes in is kept.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = MLP(config)
        self.recompute: Literal["none", "selective", "full"] = "none"

    def forward(
        self, x_BLD: Tensor, rope: tuple[Tensor, Tensor], documents: Cuts | BlockMask | None
    ) -> Tensor:
        """Return shape [B, L, D]."""
        if self.recompute == "full":
            return checkpoint(self._layer, x_BLD, rope, documents, use_reentrant=False)  # type: ignore[no-any-return]
        return self._layer(x_BLD, rope, documents)

    def _layer(
        self, x_BLD: Tensor, rope: tuple[Tensor, Tensor], documents: Cuts | BlockMask | None
    ) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rope, documents)
        if self.recompute == "selective":
            return x_BLD + checkpoint(self._feed, x_BLD, use_reentrant=False)  # type: ignore[no-any-return]
        return x_BLD + self._feed(x_BLD)

    def _feed(self, x_BLD: Tensor) -> Tensor:
        return self.ffn(self.ffn_norm(x_BLD))  # type: ignore[no-any-return]


class Rotary:
    """The angles of positions, made once for sequences of one length.

    Attributes:
        restarts: whether positions begin anew with each document. Rotary embedding knows distances
            only, and attention stays within a document, so that changes no more than roundings.
        part, parts: which of how many equal parts of its sequences a rank has, counted from 0.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.restarts = False
        self.part, self.parts = 0, 1
        self._config = config
        self._table: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, cuts: Cuts | None, length: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of each position that a rank has, as `rotate` takes them.

        Args:
            cuts: of the sequences; see `Llama.forward`.
            length: of whole sequences.
            device: where to.
        """
        # Not a buffer: that would have to be saved, or rebuilt wherever a model is made on the meta
        # device. Made on the host: the same bits for every device.
        if self._table is None or (len(self._table[0]), self._table[0].device) != (length, device):
            config = self._config
            table = rope_table(length, config.head_dim, config.rope_theta, config.rope_scaling)
            self._table = (table[0].to(device), table[1].to(device))
        cos, sin = self._table
        here = slice(self.part * length // self.parts, (self.part + 1) * length // self.parts)
        if cuts is None or not self.restarts:
            return cos[here], sin[here]
        positions_BL = sent(positions_of(cuts, length)[:, here], device)
        return cos[positions_BL], sin[positions_BL]


class Llama(nn.Module):
    """Tokens in, logits out. The head is not tied to the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        self.rotary = Rotary(config)

    def forward(self, tokens_BL: Tensor, cuts: Cuts | None = None) -> Tensor:
        """Return logits of the next token, shape [B, L, V].

        Args:
            tokens_BL: int64 token ids; with context parallelism this rank's part.
            cuts: per sequence, the borders of its documents, ascending from 0 to L. Attention
                stays within a document; positions run on through the sequence, as in Llama 3,
                unless `rotary.restarts`. None: every sequence is one document.
        """
        length = tokens_BL.shape[1] * self.rotary.parts
        rope = self.rotary(cuts, length, tokens_BL.device)
        documents = looking(cuts, length, tokens_BL.device)
        x_BLD = self.embedding(tokens_BL)
        for layer in self.layers:
            x_BLD = layer(x_BLD, rope, documents)
        return self.head(self.norm(x_BLD))  # type: ignore[no-any-return]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights, tensor by tensor in the order of their names, from `seed`.

        | weights | distribution |
        | --- | --- |
        | norms | 1 |
        | embedding | normal(0, 1) |
        | head | truncated normal(0, dim ** -0.5), at 3 sigma |
        | wq, wk, wv, w1 | truncated normal(0, 0.02), at 2 |
        | wo, w2, w3 | truncated normal(0, 0.02 / sqrt(2 (layer + 1))), at 2 |

        Source: torchtitan's Llama 3 initialisation. The result does not depend on how the model
        will be sharded, since it is drawn before.
        """
        chance = torch.Generator().manual_seed(seed)
        for name, weight in sorted(self.named_parameters()):
            part = name.split(".")
            if "norm" in name:
                weight.fill_(1.0)
            elif name.startswith("embedding"):
                weight.normal_(0.0, 1.0, generator=chance)
            elif name.startswith("head"):
                std = self.config.dim**-0.5
                nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std, generator=chance)
            else:
                deep = part[-2] in ("wo", "w2", "w3")
                std = 0.02 / math.sqrt(2 * (int(part[1]) + 1)) if deep else 0.02
                nn.init.trunc_normal_(weight, 0.0, std, generator=chance)


def next_token_loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Return the sum over all tokens of the cross entropy, float32, scalar.

    A sum, not a mean: sums of parts add up to the sum of the whole, however it is cut.
    """
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten(), reduction="sum")
