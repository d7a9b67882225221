"""Context parallelism: every rank of `cp` has its part of each sequence, and all have all of it.

Everything but attention looks at each position by itself, or at what lies before it in rank and
time alike. Attention looks at whole documents, so before it ranks exchange positions for heads:
each then has some of the heads for the whole sequence, and attends as a rank by itself would; after
it they exchange back. Any form of attention and of document mask works unchanged, and work is even
however documents lie; heads must divide by the ranks.

Source: DeepSpeed-Ulysses, arXiv 2309.14509.

Letters: B batch, H heads, L sequence length, E head width, C ranks of `cp`.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn.attention.flex_attention import BlockMask

from trainer.documents import Cuts, attend


class Exchanging:
    """Attention of one rank of a group, each of which has a part of every sequence, in order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._ranks = group, group.size()

    def __call__(
        self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, documents: Cuts | BlockMask | None
    ) -> Tensor:
        """Return the mixed values of this rank's positions, [B, H, L / C, E], from its q, k, v.

        `documents` is of whole sequences, otherwise as `attend` takes it.
        """
        q, k, v = (self._by_heads(part) for part in (q_BHLE, k_BKLE, v_BKLE))
        return self._by_positions(attend(q, k, v, documents))

    def _by_heads(self, x: Tensor) -> Tensor:
        """Exchange [B, H, L / C, E] for [B, H / C, L, E]."""
        B, H, L, E = x.shape
        parts = x.reshape(B, self._ranks, H // self._ranks, L, E).movedim(1, 0)
        return self._exchange(parts).movedim(0, 2).flatten(2, 3)

    def _by_positions(self, x: Tensor) -> Tensor:
        """Exchange [B, H / C, L, E] for [B, H, L / C, E]."""
        B, H, L, E = x.shape
        parts = x.reshape(B, H, self._ranks, L // self._ranks, E).movedim(2, 0)
        return self._exchange(parts).movedim(0, 1).flatten(1, 2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """Send each rank its part along the first dimension; return theirs, in order of ranks."""
        flat = parts.contiguous().flatten(1)
        return all_to_all_single_autograd(flat, None, None, self._group).view(parts.shape)
