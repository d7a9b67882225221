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
"""Items that are looked at at once: what is made of them on the way is several times as large."""
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_WORD = torch.int32
_own = threading.local()


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
    flat = tensor.detach().contiguous().reshape(-1)
    pieces = torch.split(flat, PIECE_WORDS) if flat.numel() > PIECE_WORDS else (flat,)
    if not flat.numel():
        return torch.zeros((), dtype=torch.int64, device=flat.device)
    shares = (_share(piece, name, start + PIECE_WORDS * at) for at, piece in enumerate(pieces))
    return functools.reduce(torch.add, shares)


def unsigned(digest: int) -> int:
    """Return a digest that was an int64 as the number in [0, 2**64) that it is."""
    return digest & _MASK


def _share(flat: Tensor, name: str, start: int) -> Tensor:
    words = _words(flat)
    per_item = max(words.numel() // max(flat.numel(), 1), 1)
    first = start * per_item
    if words.is_cuda:
        return _on_device(words, name, first)
    return torch.tensor(_signed(_on_host(words.numpy(), name, first)), dtype=torch.int64)


def _words(flat: Tensor) -> Tensor:
    """Return the items' bits as int32 words; those of 8 bytes as two."""
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    match flat.element_size():
        case 1:
            return flat.view(torch.uint8).to(_WORD)
        case 2:
            return flat.view(torch.int16).to(_WORD)
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
        # The product of integers wraps around, as it should.
        end = place + piece.size
        offset = OFFSET * (int(offsets[end]) - int(offsets[place]))
        total += _block_key(name, block) * (int(np.dot(wide, keys[place:end])) + offset)
        at += piece.size
    return total & _MASK


def _on_device(words: Tensor, name: str, first: int) -> Tensor:
    """The same sum, of whole blocks at once."""
    block, place = divmod(first, BLOCK)
    keys = _keys_on(words.device)
    blocks = -(-(place + words.numel()) // BLOCK)
    block_keys = torch.tensor(
        [_signed(_block_key(name, block + number)) for number in range(blocks)],
        device=words.device,
    )
    wide = words.to(torch.int64) + OFFSET
    padded = torch.nn.functional.pad(wide, (place, blocks * BLOCK - place - words.numel()))
    sums = (padded.view(blocks, BLOCK) * keys).sum(1)
    return (sums * block_keys).sum()


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
