"""Digests of tensors, 64 bits, cheap enough to be taken of the training state at every step.

The digest of a tensor is the sum over its 32-bit words, modulo 2**64, of key(name, i) times the
word and `OFFSET`, where i is the word's place in the whole tensor, flattened, and every key is odd.
A sum does not care how a tensor is cut, in which order it is added up, or on what device. The
offset has zeros count: 0 is what no digest at all is sent as, and moments that were lost are zero.

Why that is strong enough, in one multiplication per word: if words change by d[i] (each within
2**32 of 0, so divisible by 2**31 at most), the digest stays the same only if the sum of key * d is
0 modulo 2**64. One word that changed can not do that, since its key is odd. Several can for fewer
than one key in 2**32, whatever the pattern: a pair of sign bits, words that were swapped, a tile
that repeats. Sums of odd multiples that keep only as many bits as a word has miss all pairs of top
bits; here the upper half of the sum is what catches them. Keys are drawn once and for all, so it
finds accidents, not attackers. Source: multilinear hashing (Lemire, Kaser, The Computer Journal
2014); the keys, a product of one of the block's and one of the place in it, are our own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

BLOCK = 1 << 14
"""Words with a key each; the blocks' keys are what tells one from the next. 128 KiB of keys and as
much of products stay in a core's second-level cache."""
OFFSET = (1 << 32) + 1
"""Added to every word, so that none counts as 0: words are from -2**31 to below 2**31."""
PIECE_WORDS = 1 << 20
"""Items that are looked at at once, where they are not fused: what is made of them on the way is
several times as large."""
ROWS = 8
"""Blocks that a fused digest adds up before it multiplies by the keys in a block: those are 8 bytes
each, as much as two words, and would be read for every one."""
FUSED_WORDS = 1 << 30
"""What it takes at once: places in it are 32 bits wide on the device."""
_GOLDEN = 0x9E3779B97F4A7C15
_ODD = 0x9E3779B1
_MASK = (1 << 64) - 1
_WORD = torch.int32


_own = threading.local()

Fused: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
_fused: dict[tuple[torch.device, torch.dtype], Fused] = {}


def digest(tensor: Tensor, name: str, start: int = 0) -> Tensor:
    """Return the digest of a tensor, or the share of it that a piece has.

    Args:
        tensor: of any shape and type. Items of fewer than 4 bytes count as one word each, and
            those of 8 bytes as two.
        name: of the whole; the same bits under another name have another digest.
        start: the place of the piece's first item in the whole, flattened.

    Returns:
        A scalar, int64, on the tensor's device: nobody has waited for it. Add shares up as they
        are: int64 wraps around.
    """
    bits = _bits(tensor.detach().contiguous().reshape(-1))
    first = start * max(bits.numel() // max(tensor.numel(), 1), 1)
    if not bits.numel():
        return torch.zeros((), dtype=torch.int64, device=bits.device)
    fused = _fused.get((bits.device, bits.dtype))
    at_once, share = PIECE_WORDS, _share
    if fused is not None and bits.numel() > ROWS * BLOCK:
        at_once, share = FUSED_WORDS, functools.partial(_in_one_pass, fused)
    pieces = torch.split(bits, at_once) if bits.numel() > at_once else (bits,)
    shares = (share(piece, name, first + at_once * at) for at, piece in enumerate(pieces))
    return functools.reduce(torch.add, shares)


def fuse(device: torch.device, types: Iterable[torch.dtype]) -> None:
    """Take digests of large tensors on a device in one pass from now on, which reads them once.

    Compiles if that has not happened in this process, which takes seconds, or minutes: it is for
    whoever has announced that. Until then a digest on a GPU is made operation by operation, which
    moves some 70 bytes for each word.

    Args:
        device: where tensors are.
        types: of tensors that are to be digested so.

    Raises:
        RuntimeError: if what was compiled comes to another sum.
        Exception: whatever compiling raises. Digests are then taken as before.
    """
    for bits in {_bits(torch.empty(0, dtype=each)).dtype for each in types}:
        example = torch.arange(2 * ROWS * BLOCK + 3, device=device).mul(-_ODD).to(bits)
        if (example.device, bits) in _fused:
            continue
        fused = _compiled()
        found = int(_in_one_pass(fused, example, "example", BLOCK - 5))
        if found != int(_share(example, "example", BLOCK - 5)):
            raise RuntimeError(f"compiled for {device}, the digest of {bits} is another one")
        _fused[example.device, bits] = fused


def unsigned(digest: int) -> int:
    """Return a digest that was an int64 as the number in [0, 2**64) that it is."""
    return digest & _MASK


def _share(bits: Tensor, name: str, first: int) -> Tensor:
    words = bits.to(_WORD)
    if words.is_cuda:
        return _on_device(words, name, first)
    return torch.tensor(_signed(_on_host(words.numpy(), name, first)), dtype=torch.int64)


def _bits(flat: Tensor) -> Tensor:
    """Return the items' bits as integers of as many bytes; those of 8 and more as several of 4."""
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    match flat.element_size():
        case 1:
            return flat.view(torch.uint8)
        case 2:
            return flat.view(torch.int16)
        case _:
            return flat.view(_WORD)


def _on_host(words: npt.NDArray[np.int32], name: str, first: int) -> int:
    """Add up block by block, so that products never leave the cache: one pass over the tensor."""
    keys, scratch, offsets = _keys_in_block(), _scratch(), _offsets()
    total, at = 0, 0
    while at < words.size:
        block, place = divmod(first + at, BLOCK)
        piece = words[at : at + BLOCK - place]
        wide = scratch[: piece.size]
        np.copyto(wide, piece)
        end = place + piece.size
        # Products and sums of integers wrap around, as they should. Each by itself does more of
        # them at once than numpy's dot product of integers.
        np.multiply(wide, keys[place:end], out=wide)
        offset = OFFSET * (int(offsets[end]) - int(offsets[place]))
        total += _block_key(name, block) * (int(np.add.reduce(wide)) + offset)
        at += piece.size
    return total & _MASK


def _on_device(words: Tensor, name: str, first: int) -> Tensor:
    """The same sum, of whole blocks at once, operation by operation."""
    block, place = divmod(first, BLOCK)
    blocks = -(-(place + words.numel()) // BLOCK)
    wide = words.to(torch.int64) + OFFSET
    padded = torch.nn.functional.pad(wide, (place, blocks * BLOCK - place - words.numel()))
    sums = (padded.view(blocks, BLOCK) * _keys_on(words.device)).sum(1)
    return (sums * _block_keys_on(words.device, name, block, blocks)).sum()


def _in_one_pass(fused: Fused, bits: Tensor, name: str, first: int) -> Tensor:
    block, place = divmod(first, BLOCK)
    blocks = -(-(place + bits.numel()) // (ROWS * BLOCK)) * ROWS
    device = bits.device
    of_blocks = _block_keys_on(device, name, block, blocks)
    added = _offset_on(device, name, first, bits.numel())
    # Compiled code is made for 0 and for 1 apart, as if they were no numbers like others.
    return fused(bits, _keys_on(device), of_blocks, added, BLOCK + place)


def _sum(bits: Tensor, keys: Tensor, of_blocks: Tensor, added: Tensor, beyond: int) -> Tensor:
    """The same sum, in a form of which a compiler makes one loop over the bits as they lie there.

    Args:
        bits: of some items, as integers that may be narrower than a word.
        keys: in a block.
        of_blocks: keys of all blocks that have to do with it, and of some more: a multiple of
            `ROWS`, and not just that.
        added: what the offsets of all words come to.
        beyond: the first one's place in its block, and a block.
    """
    blocks, before = of_blocks.numel(), beyond - BLOCK
    padded = torch.nn.functional.pad(bits, (before, blocks * BLOCK - before - bits.numel()))
    rows = padded.view(blocks // ROWS, ROWS, BLOCK)
    of_rows = of_blocks.view(blocks // ROWS, ROWS, 1)
    products = [rows[:, row].to(torch.int64) * of_rows[:, row] for row in range(ROWS)]
    return (functools.reduce(torch.add, products) * keys).sum() + added


def _compiled() -> Fused:
    options: dict[str, Any] = {
        # The many loads of one product are what is wanted; else rows are written out, as int64.
        "realize_opcount_threshold": 10_000,
        "realize_acc_reads_threshold": 10_000,
        # A sum of integers is the same in any mode: modes are no reason to compile anew.
        "guard_filter_fn": lambda guards: [
            guard.guard_type in ("TENSOR_MATCH", "SHAPE_ENV") for guard in guards
        ],
    }
    compiled: Fused = torch.compile(_sum, fullgraph=True, dynamic=True, options=options)
    return compiled


def _scratch() -> npt.NDArray[np.int64]:
    """Return room for a block, of this thread: memory of that size is the system's each time."""
    if not hasattr(_own, "scratch"):
        _own.scratch = np.empty(BLOCK, np.int64)
    found: npt.NDArray[np.int64] = _own.scratch
    return found


@functools.lru_cache(maxsize=1)
def _keys_in_block() -> npt.NDArray[np.int64]:
    words = np.arange(BLOCK, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (_mixed(words) | np.uint64(1)).view(np.int64)


@functools.lru_cache(maxsize=1)
def _offsets() -> npt.NDArray[np.int64]:
    """Return the sum of the keys before each place of a block, and of all: what an offset adds."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(_keys_in_block())))


@functools.lru_cache(maxsize=8)
def _keys_on(device: torch.device) -> Tensor:
    return torch.from_numpy(_keys_in_block()).to(device)


# Kept for good: 8 bytes for 16,384 words of each piece of the state. This thread waits until it is
# there, for whatever stream reads it later.
@functools.cache
def _block_keys_on(device: torch.device, name: str, block: int, blocks: int) -> Tensor:
    keys = (_signed(_block_key(name, block + number)) for number in range(blocks))
    return torch.tensor(list(keys)).to(device)


@functools.cache
def _offset_on(device: torch.device, name: str, first: int, words: int) -> Tensor:
    """Return what the offsets of so many words come to."""
    offsets, total, end = _offsets(), 0, first + words
    while first < end:
        block, place = divmod(first, BLOCK)
        upto = min(BLOCK, place + end - first)
        total += _block_key(name, block) * OFFSET * (int(offsets[upto]) - int(offsets[place]))
        first += upto - place
    return torch.tensor(_signed(total & _MASK)).to(device)


def _block_key(name: str, block: int) -> int:
    return xxhash.xxh3_64_intdigest(name.encode(), seed=block) | 1


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(multiplier)
    return words ^ (words >> np.uint64(31))


def _signed(number: int) -> int:
    """Return the int64 with the bits of a number in [0, 2**64)."""
    return number - (1 << 64) if number >> 63 else number
