"""Lays out one rank's share of a checkpoint as a body of bytes and an index that vouches for it.

The body is a safetensors file, written by hand into a buffer of the caller's (shared memory), so
that staging is one copy per tensor. The index says what is in it and what its digests were when it
was staged; whoever reads the body later, on whatever machine, verifies it against that index.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from storage import parallel
from storage.digest import (
    BLOCK_BYTES,
    Buffer,
    StreamDigest,
    block_crcs,
    blocks_of,
    byte_view,
    chunk_digest,
    digest_stream,
    sha256_hex,
)
from storage.errors import ShardCorruptError, UnsupportedVersionError

VERSION = 1
DATA_ALIGNMENT = 4096
SHARD_BYTES_MAX = 1 << 40
DIMENSIONS_MAX = 64
"""As many as torch has. To multiply a million made-up ones takes for ever."""
INDEX_BYTES_MAX = 64 * 1024 * 1024

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}

Scalar: TypeAlias = int | float | str | bool | None
Extra: TypeAlias = dict[str, Scalar | list[Scalar]]


class Chunk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A box of one tensor, as this rank holds it: `shape` items from `offset` of `global_shape`.

    `fqn` names the tensor in the model, `state` which of its states this is ("param", "exp_avg",
    ...), `dtype` is safetensors' name for the item type.
    """

    fqn: str
    state: str
    dtype: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def name(self) -> str:
        """The tensor's name in the file."""
        return f"{self.state}/{self.fqn}"

    @property
    def size(self) -> int:
        """Bytes of the chunk."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class StagedChunk(Chunk, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A chunk whose bytes were staged: its byte range [start, end) in the body and their digest."""

    start: int
    end: int
    xxh3_128: str


class ShardMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard belongs to, and the state beside the tensors.

    `model` is a fingerprint of the architecture, `epoch` the run's generation (the fencing token),
    `shard` the number of this shard among `shards`. `extra` holds what else a resumed run needs
    (data cursor, learning rate step): plain JSON values and lists of them, finite numbers only.
    """

    run_id: str
    model: str
    step: int
    epoch: int
    shard: int
    shards: int
    extra: Extra = {}


class ShardIndex(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is known about a body.

    `crc32c` has one value per `block_bytes` of it; as staged, only of the blocks that the header
    lies in: who writes a body verifies it, and sums the others in the same pass.
    """

    version: int
    run_id: str
    model: str
    step: int
    epoch: int
    shard: int
    shards: int
    size: int
    block_bytes: int
    crc32c: tuple[int, ...]
    chunks: tuple[StagedChunk, ...]
    extra: Extra


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Where each chunk lies in the body; computed once per topology and used for every save.

    Attributes:
        chunks: in the order of the body.
        spans: byte range [start, end) in the body of each chunk.
        header: safetensors header with its length field and padding; the body's first bytes.
        size: bytes of the body.
    """

    chunks: tuple[Chunk, ...]
    spans: tuple[tuple[int, int], ...]
    header: bytes
    size: int

    def views(self, buffer: memoryview | bytearray) -> dict[str, memoryview]:
        """Return a writable view of bytes for each tensor name, to copy the tensors into.

        Raises:
            ValueError: if the buffer is read-only or smaller than `size`.
        """
        body = _writable(self, buffer)
        return {
            chunk.name: body[start:end]
            for chunk, (start, end) in zip(self.chunks, self.spans, strict=True)
        }


def plan(chunks: Iterable[Chunk]) -> ShardPlan:
    """Lay out the chunks: largest items first, then by name, no gaps, from a multiple of 4 KiB.

    Raises:
        ValueError: if a dtype is unknown, a box does not fit its tensor or has more than
            `DIMENSIONS_MAX` dimensions, a name occurs twice, or the body would exceed 1 TiB.

    Source: https://github.com/huggingface/safetensors#format; gaps are illegal there, and larger
        items first keeps every chunk aligned to its item.
    """
    ordered = sorted(map(_checked, chunks), key=lambda c: (-ITEM_BYTES[c.dtype], c.name))
    table: dict[str, object] = {"__metadata__": {"format": "pt", "holdfast": str(VERSION)}}
    ranges = []
    at = 0
    for chunk in ordered:
        if chunk.name in table:
            raise ValueError(f"two chunks have the name {chunk.name}")
        ranges.append((at, at + chunk.size))
        table[chunk.name] = {
            "dtype": chunk.dtype,
            "shape": chunk.shape,
            "data_offsets": (at, at + chunk.size),
        }
        at += chunk.size
    header = _padded_header(msgspec.json.encode(table))
    size = len(header) + at
    if size > SHARD_BYTES_MAX:
        raise ValueError(f"body has {size} bytes, may have {SHARD_BYTES_MAX}")
    spans = tuple((len(header) + start, len(header) + end) for start, end in ranges)
    return ShardPlan(tuple(ordered), spans, header, size)


def seal(
    plan: ShardPlan,
    buffer: memoryview | bytearray,
    meta: ShardMeta,
    fill: Callable[[int, memoryview], object] = lambda _, __: None,
) -> ShardIndex:
    """Write the header, digest the staged bytes, and return the index that vouches for them.

    Nobody else may write to the buffer meanwhile. Can run in a thread beside training: digests let
    go of the interpreter's lock. CRCs of blocks without a header in them say nothing that the
    digests of chunks do not say, and take twice as long: `write_shard` adds them.

    Args:
        plan: where each chunk lies in the body.
        buffer: the body.
        meta: what the shard belongs to.
        fill: called with the place and the memory of each piece of the body, in order, right before
            it is digested: what is copied there only then is digested in a core's cache. It must
            leave the header alone.

    Cost: 20 GB/s on one core; beside a thread that never lets go of the lock by itself, up to 10 ms
    more for each MiB.

    Raises:
        ValueError: if the buffer is read-only or too small, or the meta data is not plain: numbers
            must be finite, and the shard one of its count.
    """
    _check_meta(meta)
    body = _writable(plan, buffer)
    body[: len(plan.header)] = plan.header
    measured = digest_stream(plan.spans, blocks_of(body), fill=fill, crc_bytes=len(plan.header))
    return ShardIndex(
        version=VERSION,
        run_id=meta.run_id,
        model=meta.model,
        step=meta.step,
        epoch=meta.epoch,
        shard=meta.shard,
        shards=meta.shards,
        size=plan.size,
        block_bytes=BLOCK_BYTES,
        crc32c=tuple(measured.crcs),
        chunks=_staged(plan, measured),
        extra=meta.extra,
    )


def encode_index(index: ShardIndex) -> bytes:
    """Return the index as canonical JSON: the same index gives the same bytes, always."""
    return msgspec.json.encode(index, order="deterministic")


def index_digest(index: ShardIndex) -> str:
    """Return the SHA-256 of the index's JSON, 64 hex digits; a manifest lists it."""
    return sha256_hex(encode_index(index))


def as_staged(index: ShardIndex) -> ShardIndex:
    """Return an index with the CRCs that `seal` makes: two of one shard are the same then."""
    return msgspec.structs.replace(index, crc32c=index.crc32c[: _header_blocks(index)])


def decode_index(data: Buffer, *, staged: bool = False) -> ShardIndex:
    """Read an index that may come from anywhere, and check that it is one.

    Args:
        data: its JSON.
        staged: whether it may be one that has not been written yet, which has fewer CRCs.

    Raises:
        ShardCorruptError: if it does not decode, or its byte ranges are not those of its chunks.
        UnsupportedVersionError: if it was written in another version of the format.
    """
    if len(data) > INDEX_BYTES_MAX:
        raise ShardCorruptError(f"index has {len(data)} bytes, may have {INDEX_BYTES_MAX}")
    try:
        version = _read_version(data).version
        if version != VERSION:
            raise UnsupportedVersionError(f"index has version {version}, known is {VERSION}")
        index = _read_index(data)
        layout = plan(index.chunks)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ShardCorruptError(f"index does not decode: {error}") from error
    spans = tuple((chunk.start, chunk.end) for chunk in index.chunks)
    crcs = -(-layout.size // BLOCK_BYTES)
    if staged and len(index.crc32c) != crcs:
        crcs = -(-len(layout.header) // BLOCK_BYTES)
    if (layout.chunks, layout.spans, layout.size, BLOCK_BYTES, crcs) != (
        (index.chunks, spans, index.size, index.block_bytes, len(index.crc32c))
    ):
        raise ShardCorruptError(f"index contradicts itself: {describe(index)}")
    if encode_index(index) != data:
        raise ShardCorruptError(f"index is not in canonical form: {describe(index)}")
    return index


def verify(index: ShardIndex, buffer: Buffer) -> ShardIndex:
    """Check that a body is what was staged; a longer buffer is checked up to the body's size.

    Returns:
        The index with the CRCs of all blocks.

    Raises:
        ShardCorruptError: naming the first bad chunk.
    """
    crcs = verify_blocks(index, blocks_of(byte_view(buffer)[: index.size]))
    return msgspec.structs.replace(index, crc32c=crcs)


def verify_blocks(
    index: ShardIndex,
    blocks: Iterable[Buffer],
    digested: Callable[[int, memoryview], object] = lambda _, __: None,
    *,
    to_restore: bool = False,
) -> tuple[int, ...]:
    """Check a body that comes in pieces of `index.block_bytes`, holding one at a time.

    What `digested` is told (see `digest_stream`) is verified once this returns, and not before.

    Args:
        index: of the body.
        blocks: its bytes.
        digested: hears of them.
        to_restore: whether it is enough to know that the bytes are those that were staged. Then
            only the header's blocks have their CRCs compared: those of others say nothing that the
            digests of chunks do not say, but for themselves, which is for who writes and scrubs.

    Returns:
        The CRCs of the blocks, as far as they were computed.

    Raises:
        ShardCorruptError: naming the first bad chunk.
    """
    measured = digest_stream(
        [(c.start, c.end) for c in index.chunks],
        blocks,
        digested,
        crc_bytes=_header_bytes(index) if to_restore else None,
    )
    if measured.size != index.size:
        raise ShardCorruptError(
            f"body has {measured.size} bytes, index says {index.size}: {describe(index)}"
        )
    for chunk, found in zip(index.chunks, measured.spans, strict=True):
        _require_chunk(index, chunk, found)
    _require_blocks(index, measured.crcs)
    return tuple(measured.crcs)


def open_views(index: ShardIndex, buffer: Buffer) -> dict[str, memoryview]:
    """Verify a body and return a read-only view of bytes for each tensor name.

    Chunks are verified by `parallel.CORES` threads. The CRCs of blocks without a header in them say
    nothing that the chunks' digests do not say, so they are not computed here.

    Raises:
        ShardCorruptError: naming the first bad chunk; nobody gets views of bytes that were not
            verified in the same process.
    """
    body = byte_view(buffer).toreadonly()[: index.size]
    if len(body) != index.size:
        raise ShardCorruptError(
            f"body has {len(body)} bytes, index says {index.size}: {describe(index)}"
        )

    def opened(chunk: StagedChunk) -> memoryview:
        view = body[chunk.start : chunk.end]
        _require_chunk(index, chunk, chunk_digest(view))
        return view

    views = parallel.each(opened, index.chunks, at_once=parallel.CORES)
    head = body[: _header_blocks(index) * index.block_bytes]
    _require_blocks(index, block_crcs(head, index.block_bytes))
    return {chunk.name: view for chunk, view in zip(index.chunks, views, strict=True)}


def describe(index: ShardIndex) -> str:
    """Return the words that name a shard in messages."""
    return f"shard {index.shard} of step {index.step}, epoch {index.epoch}"


def _header_bytes(index: ShardIndex) -> int:
    return index.chunks[0].start if index.chunks else index.size


def _header_blocks(index: ShardIndex) -> int:
    return -(-_header_bytes(index) // index.block_bytes)


class _Version(msgspec.Struct):
    version: int


# Made here, not at the first call: of two threads that make msgspec learn a struct at once, one
# reads what is not there yet, and the process dies of SIGSEGV (msgspec 0.22).
_read_version = msgspec.json.Decoder(_Version).decode
_read_index = msgspec.json.Decoder(ShardIndex).decode


def _require_chunk(index: ShardIndex, chunk: StagedChunk, found: str) -> None:
    if found != chunk.xxh3_128:
        raise ShardCorruptError(
            f"xxh3-128 is {found}, index says {chunk.xxh3_128}: {chunk.name} of {describe(index)}"
        )


def _require_blocks(index: ShardIndex, first: Sequence[int]) -> None:
    """Compare the CRCs that are known of the first blocks, every chunk of which is intact."""
    known = index.crc32c[: len(first)]
    if tuple(first[: len(known)]) != known:
        # So the damage is in the header, or in the index itself.
        raise ShardCorruptError(f"crc32c of the header's block differs: {describe(index)}")


def _checked(chunk: Chunk) -> Chunk:
    if chunk.dtype not in ITEM_BYTES:
        raise ValueError(f"dtype is {chunk.dtype}, known are {', '.join(ITEM_BYTES)}: {chunk.name}")
    if not chunk.fqn or not chunk.state or "/" in chunk.state:
        raise ValueError(f"fqn and state must not be empty, nor the state have a /: {chunk.name}")
    dims = (chunk.shape, chunk.offset, chunk.global_shape)
    most = max(map(len, dims))
    if most > DIMENSIONS_MAX:
        raise ValueError(f"box has {most} dimensions, may have {DIMENSIONS_MAX}: {chunk.name}")
    if len(set(map(len, dims))) != 1 or any(
        size < 0 or at < 0 or at + size > whole for size, at, whole in zip(*dims, strict=True)
    ):
        raise ValueError(
            f"box of shape {chunk.shape} at {chunk.offset} is not inside "
            f"{chunk.global_shape}: {chunk.name}"
        )
    return chunk


def _padded_header(table: bytes) -> bytes:
    padded = -(-(8 + len(table)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    return padded.to_bytes(8, "little") + table.ljust(padded)


def _writable(plan: ShardPlan, buffer: memoryview | bytearray) -> memoryview:
    body = byte_view(buffer)
    if body.readonly or len(body) < plan.size:
        raise ValueError(
            f"buffer must be writable and have {plan.size} bytes; it has {len(body)}, "
            f"{'read-only' if body.readonly else 'writable'}"
        )
    return body[: plan.size]


def _check_meta(meta: ShardMeta) -> None:
    if not 0 <= meta.shard < meta.shards or meta.step < 0 or meta.epoch < 0:
        raise ValueError(
            f"shard {meta.shard} of {meta.shards}, step {meta.step}, epoch {meta.epoch} "
            "must count from 0, and the shard be below the count"
        )
    for key, value in meta.extra.items():
        for item in value if isinstance(value, list) else [value]:
            # JSON has no NaN; an encoder would silently write null instead.
            if not _is_plain(item):
                raise ValueError(f"extra must be plain finite JSON values: {key} is {value!r}")


def _is_plain(item: object) -> bool:
    if isinstance(item, float):
        return math.isfinite(item)
    if isinstance(item, int):
        return -(1 << 63) <= item < 1 << 64
    return item is None or isinstance(item, str)


def _staged(plan: ShardPlan, measured: StreamDigest) -> tuple[StagedChunk, ...]:
    rows = zip(plan.chunks, plan.spans, measured.spans, strict=True)
    return tuple(
        StagedChunk(**msgspec.structs.asdict(chunk), start=start, end=end, xxh3_128=digest)
        for chunk, (start, end), digest in rows
    )
