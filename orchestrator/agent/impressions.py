"""What a staged shard looks like: few bytes by which the controller sees what can not be a state.

Digests of chunks are there already, from the staged bytes. Numbers are looked at in samples: what
breaks training, a NaN or a weight out of all proportion, has spread to nearly all of them when the
next state is saved, and a pass over every byte would cost more than the digests do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from orchestrator.protocol.messages import Impression, Receipt
from storage import coverage
from storage.digest import Buffer
from storage.shard import Extra, ShardIndex, StagedChunk

SAMPLE_BYTES, SAMPLE_EVERY = 64 << 10, 1 << 20
"""Of each MiB of a chunk, so much is looked at."""
BAD_NAMED = 3
WEIGHTS = "param"
"""State of the chunks that are weights; all others are what the optimizer remembers of them."""
_FLOATS: dict[str, type[np.floating[Any]]] = {
    "F32": np.float32,
    "F64": np.float64,
    "F16": np.float16,
}


class Written(NamedTuple):
    """A shard that is durable."""

    receipt: Receipt
    impression: Impression


class _Sealed(msgspec.Struct):
    """What is read of an index for this; the rest is skipped."""

    shard: int
    chunks: tuple[StagedChunk, ...]
    extra: Extra


# As in storage/shard.py: made before there are threads.
_read = msgspec.json.Decoder(_Sealed).decode


def of_index(index: str | bytes | ShardIndex) -> Impression:
    """Return what an index alone says of a shard.

    Raises:
        msgspec.MsgspecError: if it is none.
    """
    sealed = index if isinstance(index, ShardIndex) else _read(index)
    chunks = [chunk for chunk in sealed.chunks if chunk.size]
    boxes = ((c.name, c.dtype, c.shape, c.global_shape, c.offset) for c in sealed.chunks)
    return Impression(
        shard=sealed.shard,
        boxes=_short(boxes),
        content=_digests(sealed.chunks),
        moving=_digests(chunk for chunk in chunks if chunk.state != WEIGHTS),
        extra=_short([sealed.extra]),
        gap=coverage.gap(sealed.chunks),
    )


def of_shard(index: ShardIndex, body: Buffer) -> Impression:
    """Return what a shard looks like, its bytes included; they are those that were staged."""
    known = of_index(index)
    bad: list[str] = []
    squares = {True: 0.0, False: 0.0}
    counts = {True: 0, False: 0}
    for chunk in index.chunks:
        kind = _FLOATS.get(chunk.dtype)
        if kind is None or not chunk.size:
            continue
        total, count = _sampled(memoryview(body)[chunk.start : chunk.end], kind)
        if not math.isfinite(total):
            bad.append(chunk.name)
            continue
        squares[chunk.state == WEIGHTS] += total
        counts[chunk.state == WEIGHTS] += count
    return msgspec.structs.replace(
        known,
        # What was never updated has moments of zero, and those stay as they are.
        moving=known.moving if squares[False] > 0 else "",
        bad=tuple(bad[:BAD_NAMED]),
        rms=float(f"{math.sqrt(squares[True] / counts[True]):.6g}") if counts[True] else -1.0,
    )


def _sampled(chunk: memoryview, kind: type[np.floating[Any]]) -> tuple[float, int]:
    """Return the sum of squares of a sample, not finite if anything in it is not, and its size."""
    total, count = 0.0, 0
    with np.errstate(all="ignore"):
        for start in range(0, len(chunk), SAMPLE_EVERY):
            values = np.frombuffer(chunk[start : start + SAMPLE_BYTES], kind).astype(np.float64)
            # Not `dot`: it wakes a thread for each core, which then spins beside training.
            total += float(np.square(values).sum())
            count += len(values)
    return total, count


def _digests(chunks: Iterable[StagedChunk]) -> str:
    text = "".join(f"{chunk.name} {chunk.xxh3_128}\n" for chunk in chunks)
    return xxhash.xxh3_128_hexdigest(text.encode()) if text else ""


def _short(items: Iterable[object]) -> str:
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(list(items), order="deterministic"))
