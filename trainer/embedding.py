"""Looks words up, so that on a GPU, too, the same gradients come out of the same step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Embedding(nn.Embedding):
    """torch's own, but for the gradient on a GPU: it does not depend on who adds first."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Return the vectors of some words, shape [..., D]."""
        if self.weight.is_cuda and not isinstance(self.weight, DTensor):
            return Looked.apply(input, self.weight)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(input)


class Looked(torch.autograd.Function):
    """A lookup whose gradient is added up in a fixed order.

    Where few words come often, torch (2.11 and later) adds their gradients up with atomics, in the
    order in which they happen to arrive. It does not do so while it is asked for deterministic
    algorithms, which for all of a step would slow down what is deterministic anyway.
    """

    @staticmethod
    def forward(ctx: Any, words: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        """Return the vectors of some words."""
        ctx.save_for_backward(words)
        ctx.vocab = len(weight)
        return F.embedding(words, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:  # noqa: ANN401 - torch's own
        """Return the gradient of the weight."""
        (words,) = ctx.saved_tensors
        with _in_a_fixed_order():
            return None, torch.ops.aten.embedding_dense_backward(
                gradients[0], words, ctx.vocab, -1, scale_grad_by_freq=False
            )


@contextlib.contextmanager
def _in_a_fixed_order() -> Iterator[None]:
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
