"""Computes the digests that follow a checkpoint's bytes from staging to restore.

Three kinds, for three questions: `chunk_digest` (is this chunk the one that was staged?),
`crc32c` per block (is this range of a file intact, without reading the rest?), and the state
digest (is this the same training state, however it is sharded?). None of them is tamper-proof:
they find accidents, not attackers.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash
from crc32c import crc32c as _crc32c

Buffer: TypeAlias = bytes | bytearray | memoryview
Lanes: TypeAlias = tuple[int, int]

BLOCK_BYTES = 16 * 1024 * 1024
PASS_BYTES = 512 * 1024
"""What is copied or written and digested at a time: where it comes from and where it goes to, both,
have to stay in a core's second-level cache. Of a MiB they often do not: a restore into tensors
takes 0.32 to 0.44 s for a GiB then, and 0.24 to 0.27 s with this, on cores that others used as
well. Smaller pieces gain nothing, and ask more often for the interpreter's lock."""

_LANES = 2
_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
# Two such arrays of 8-byte words stay inside a core's second-level cache.
_ELEMENTS_PER_PASS = 1 << 15
_RAMP = np.arange(_ELEMENTS_PER_PASS, dtype=np.uint64) * np.uint64(_GOLDEN)
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def byte_view(buffer: Buffer) -> memoryview:
    """Return the buffer as a flat view of bytes, without a copy.

    Raises:
        TypeError: if the buffer is not C-contiguous.
    """
    view = memoryview(buffer)
    # memoryview.cast refuses shapes with a zero in them.
    return view.cast("B") if view.nbytes else memoryview(b"")


def blocks_of(buffer: Buffer, block_bytes: int = BLOCK_BYTES) -> Iterable[memoryview]:
    """Yield the buffer in blocks of `block_bytes`; the last one may be shorter."""
    view = byte_view(buffer)
    for start in range(0, len(view), block_bytes):
        yield view[start : start + block_bytes]


def chunk_digest(data: Buffer) -> str:
    """Return the xxh3-128 of the data as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(byte_view(data))


def sha256_hex(data: Buffer) -> str:
    """Return the SHA-256 of the data as 64 hex digits; for small inputs, it is the slowest."""
    return hashlib.sha256(data).hexdigest()


def crc32c(data: Buffer, before: int = 0) -> int:
    """Return the CRC-32C (Castagnoli) of the data, unsigned.

    Args:
        data: any bytes; for more than 32 KiB the library lets go of the interpreter's lock.
        before: CRC of what comes before the data.

    >>> hex(crc32c(b"6789", crc32c(b"12345")))
    '0xe3069283'
    """
    crc: int = _crc32c(byte_view(data), before)
    return crc


def block_crcs(buffer: Buffer, block: int = BLOCK_BYTES) -> list[int]:
    """Return the CRC-32C of every block of `block` bytes, in order."""
    return [crc32c(piece) for piece in blocks_of(buffer, block)]


@dataclass(frozen=True, slots=True)
class StreamDigest:
    """What `digest_stream` measured: xxh3-128 per span, CRC-32C per block, bytes in all."""

    spans: list[str]
    crcs: list[int]
    size: int


def digest_stream(
    spans: Sequence[tuple[int, int]],
    blocks: Iterable[Buffer],
    digested: Callable[[int, memoryview], object] = lambda _, __: None,
    *,
    fill: Callable[[int, memoryview], object] = lambda _, __: None,
    crc_bytes: int | None = None,
) -> StreamDigest:
    """Digest a body in one pass, holding one block at a time.

    Args:
        spans: byte ranges [start, end) of the body, ascending and without overlap.
        blocks: the body, in consecutive pieces; one CRC is returned for each, see `crc_bytes`.
        digested: called with the place and the bytes of each `PASS_BYTES`, in order, while a core's
            cache still has them.
        fill: called with the place and the memory of each before it is digested, to write there
            what is to be.
        crc_bytes: only blocks that begin before this byte have a CRC; None for all.

    Returns:
        The digests of the spans that the body reached, of the blocks, and the body's size. If the
        body ends early there are fewer digests than spans.
    """
    digests: list[str] = []
    crcs: list[int] = []
    position = 0
    hasher = xxhash.xxh3_128()
    for block in blocks:
        summed = crc_bytes is None or position < crc_bytes
        crc = 0
        for view in blocks_of(block, PASS_BYTES):
            fill(position, view)
            if summed:
                crc = crc32c(view, crc)
            end = position + len(view)
            while len(digests) < len(spans):
                start, stop = spans[len(digests)]
                hasher.update(view[max(start, position) - position : min(stop, end) - position])
                if stop > end:
                    break
                digests.append(hasher.hexdigest())
                hasher.reset()
            digested(position, view)
            position = end
        if summed:
            crcs.append(crc)
    return StreamDigest(digests, crcs, position)


def partial_digest(
    name: str, array: npt.NDArray[np.generic], *, start: int = 0, row: int | None = None
) -> Lanes:
    """Return the share that a piece of a tensor has in the state digest.

    The share is a sum over elements, modulo 2**64, of mix(mix(key + i * golden) XOR bits), where i
    is the element's index in the whole tensor, flattened in row-major order, and key is the xxh3-64
    of the name, seeded with the lane's number. A sum does not care how the tensor is cut or in
    which order the pieces come, and every term depends on name, position and value.

    Args:
        name: of the whole tensor, such as "param/layers.0.wq.weight".
        array: a piece that is contiguous in the flat order of the whole tensor, any shape; items of
            1, 2, 4 or 8 bytes. Pass bfloat16 as a view of uint16.
        start: flat index, in the whole tensor, of the piece's first element.
        row: if the piece is a block of columns, of shape [rows, columns]: elements of a row of the
            whole tensor.

    Returns:
        Two independent sums in [0, 2**64); (0, 0) for an empty piece.

    Raises:
        ValueError: if the start is negative, items are not plain native words of those widths, or
            a block of columns has rows longer than the whole tensor's.

    Source: the finaliser is splitmix64's (Steele, Lea, Flood, OOPSLA 2014); the sum is our own.

    >>> a = np.arange(6, dtype=np.float32)
    >>> whole = partial_digest("w", a)
    >>> combine([partial_digest("w", a[4:], start=4), partial_digest("w", a[:4])]) == whole
    True
    """
    if start < 0:
        raise ValueError(f"start is {start}, must be 0 or more: {name}")
    dtype = array.dtype
    if dtype.hasobject or not dtype.isnative or dtype.itemsize not in _UNSIGNED:
        raise ValueError(f"dtype is {dtype}, must be native words of 1, 2, 4 or 8 bytes: {name}")
    bits = np.ascontiguousarray(array).reshape(-1).view(_UNSIGNED[dtype.itemsize])
    keys = [xxhash.xxh3_64_intdigest(name.encode(), seed=lane) for lane in range(_LANES)]
    width = array.shape[-1] if row is not None and array.ndim else max(bits.size, 1)
    skip = 0 if row is None else row - width
    if skip < 0:
        raise ValueError(f"rows have {width} elements, those of the whole tensor {row}: {name}")
    first, second = (_lane_sum(bits, start, key, max(width, 1), skip) for key in keys)
    return first, second


def combine(parts: Iterable[Lanes]) -> Lanes:
    """Return the digest of all the pieces together; (0, 0) for none."""
    first = second = 0
    for part in parts:
        first += part[0]
        second += part[1]
    return first & _MASK_64, second & _MASK_64


def render(parts: Lanes) -> str:
    """Return the lanes as 32 hex digits, the form that is stored and shown."""
    return f"{parts[0]:016x}{parts[1]:016x}"


def _lane_sum(
    bits: npt.NDArray[np.unsignedinteger], start: int, key: int, width: int, skip: int
) -> int:
    """Return a lane's sum over words of which `skip` others lie between each `width` of them."""
    total = 0
    words = np.empty(min(_ELEMENTS_PER_PASS, bits.size), np.uint64)
    scratch = np.empty_like(words)
    for at in range(0, bits.size, _ELEMENTS_PER_PASS):
        piece = bits[at : at + _ELEMENTS_PER_PASS]
        h, tmp = words[: piece.size], scratch[: piece.size]
        np.add(_RAMP[: piece.size], np.uint64((key + (start + at) * _GOLDEN) & _MASK_64), out=h)
        if skip:
            np.floor_divide(
                np.arange(at, at + piece.size, dtype=np.uint64), np.uint64(width), out=tmp
            )
            np.multiply(tmp, np.uint64((skip * _GOLDEN) & _MASK_64), out=tmp)
            np.add(h, tmp, out=h)
        _mix(h, tmp)
        np.bitwise_xor(h, piece, out=h)
        _mix(h, tmp)
        total += int(h.sum(dtype=np.uint64))
    return total & _MASK_64


def _mix(h: npt.NDArray[np.uint64], tmp: npt.NDArray[np.uint64]) -> None:
    """Apply the finaliser of splitmix64 in place; a bijection on 64-bit words."""
    np.right_shift(h, np.uint64(30), out=tmp)
    np.bitwise_xor(h, tmp, out=h)
    np.multiply(h, _MULTIPLIER_1, out=h)
    np.right_shift(h, np.uint64(27), out=tmp)
    np.bitwise_xor(h, tmp, out=h)
    np.multiply(h, _MULTIPLIER_2, out=h)
    np.right_shift(h, np.uint64(31), out=tmp)
    np.bitwise_xor(h, tmp, out=h)
