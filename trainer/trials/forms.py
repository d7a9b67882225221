"""In which forms numbers come out wrong (orchestrator.protocol.injections).

Letters in array names: N elements of a tensor, K of them that are struck.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from orchestrator.protocol.injections import Injection

TILE, PERIOD = 4, 64
"""Of a faulty unit: so many neighbours, once in so many elements. Source: AEGIS, its first case."""
STUCK, TINY, HUGE = 0.7071, 1e-30, 1e4
BIAS = 1.0 + 2.0**-10


@torch.no_grad()
def spoil(tensor: Tensor, how: Injection) -> bool:
    """Make some elements of a tensor wrong, in place; return whether a bit of it has changed.

    Args:
        tensor: contiguous, of items of 4 bytes; or of 8, for forms that only move elements.
        how: where and in which form.
    """
    flat_N = tensor.view(-1)
    at_K = _struck(flat_N, how)
    if not len(at_K):
        return False
    before_K = flat_N[at_K].clone()
    _change(flat_N, at_K, how)
    words = torch.int64 if flat_N.element_size() == 8 else torch.int32
    return not torch.equal(before_K.view(words), flat_N[at_K].view(words))


@torch.no_grad()
def spoiled(tensor: Tensor, how: Injection) -> tuple[Tensor, bool]:
    """Return the same of a copy, for tensors that are somebody else's."""
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    changed = spoil(copied, how)
    return copied, changed


def _struck(flat_N: Tensor, how: Injection) -> Tensor:
    """Return which elements are struck: the same ones every time, as of a unit that is broken."""
    size = flat_N.numel()
    if not size:
        return torch.empty(0, dtype=torch.int64)
    first, count = int(how.element * size), min(how.elements, size)
    match how.form:
        case "tile":
            at = (first + PERIOD * np.arange(count)[:, None] + np.arange(TILE)).reshape(-1) % size
        case "flip" if count > 1:
            chance = np.random.Generator(np.random.Philox(how.seed))
            at = chance.choice(size, count, replace=False)
        case "swap":
            at = np.array([first, first + 1]) % size
        case _:
            at = (first + np.arange(count)) % size
    at_K = torch.from_numpy(np.unique(at).astype(np.int64))
    if how.within is not None:
        magnitude_K = flat_N[at_K].abs()
        at_K = at_K[(magnitude_K >= how.within.low) & (magnitude_K < how.within.high)]
    return at_K


def _change(flat_N: Tensor, at_K: Tensor, how: Injection) -> None:
    was_K = flat_N[at_K]
    match how.form:
        case "flip" | "tile":
            words_N = flat_N.view(torch.int32)
            words_N[at_K] = words_N[at_K] ^ _mask(how.bits)
        case "swap":
            flat_N[at_K] = was_K.flip(0)
        case "stale":
            flat_N[at_K] = flat_N[(at_K + len(at_K)) % flat_N.numel()]
        case "bias":
            flat_N[at_K] = was_K * BIAS
        case "huge":
            # The sign is another one, too.
            flat_N[at_K] = -torch.copysign(HUGE * (1.0 + was_K.abs()), was_K)
        case "stuck" | "tiny" | "inf" | "nan" | "zeros":
            value = {"stuck": STUCK, "tiny": TINY, "zeros": 0.0}.get(how.form)
            flat_N[at_K] = float(how.form) if value is None else value


def _mask(bits: tuple[int, ...]) -> int:
    """Return the int32 with these bits."""
    mask = sum(1 << bit for bit in bits)
    return mask - (1 << 32) if mask >> 31 else mask
