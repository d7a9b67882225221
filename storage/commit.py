"""Writes shards, commits a generation, and reads a committed shard back.

The order is the whole idea: every shard is durable before the commit record is put, and that one
exclusive put is the moment at which the checkpoint comes to be. FORMAT.md has the crash matrix.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from functools import partial

import msgspec

from storage import parallel
from storage.blob import BlobStore, get_into, get_small
from storage.digest import BLOCK_BYTES, Buffer, byte_view, sha256_hex
from storage.errors import (
    BlobExistsError,
    BlobNotFoundError,
    ForeignCheckpointError,
    ShardCorruptError,
    StaleEpochError,
    StorageError,
    UnstorableError,
)
from storage.manifest import (
    COMMITS,
    DIGEST_BYTES,
    GENERATIONS,
    VERDICTS,
    Manifest,
    ShardReceipt,
    body_key,
    commit_key,
    describe,
    digests_key,
    digests_of_groups,
    encode_manifest,
    generation_prefix,
    index_key,
    parse_commit_key,
    parse_generation_key,
    parse_verdict_key,
    read_manifest,
    receipt_of,
)
from storage.paged import paged
from storage.shard import (
    INDEX_BYTES_MAX,
    ShardIndex,
    decode_index,
    encode_index,
    verify,
    verify_blocks,
)
from storage.shard import describe as describe_shard

CRC_DIGITS_MAX = 11
"""Bytes that the sum of a block takes in an index, with its comma."""
BLOCKS_AHEAD = 4
"""Of 16 MiB each, that are read at a time: a single stream of object storage is slow."""


def write_shard(store: BlobStore, index: ShardIndex, body: Buffer) -> ShardReceipt:
    """Make a staged shard durable and return what the manifest needs of it.

    The body is verified on the way: of what was damaged between staging and here nothing stays. In
    the same pass its blocks are summed: the index that is stored has all CRCs, a staged one not.
    Writing the same shard again is fine, so that a caller that was stopped half-way starts over.

    Args:
        store: of the run.
        index: from `seal`.
        body: the sealed buffer; what lies beyond `index.size` is not looked at.

    Raises:
        ShardCorruptError: if the body does not match the index; nothing of it stays.
        BlobExistsError: if another shard is stored under this number; it stays.
        StorageFullError: if there is no room.
        UnstorableError: if the index is larger than any reader takes; nothing is stored.
    """
    size = len(encode_index(index)) + CRC_DIGITS_MAX * -(-index.size // BLOCK_BYTES)
    if size > INDEX_BYTES_MAX:
        raise UnstorableError(
            f"index has {size} bytes, may have {INDEX_BYTES_MAX}, with "
            f"{len(index.chunks)} tensors and the values beside them: {describe_shard(index)}"
        )
    where = (index.step, index.epoch, index.shard)
    # The body goes first: an index that is there promises that its body is.
    index = _put_body(store, index, body)
    encoded = encode_index(index)
    try:
        store.put(index_key(*where), encoded)
    except BlobExistsError:
        if store.get(index_key(*where), 0, len(encoded) + 1) != encoded:
            raise BlobExistsError(f"another shard is stored: {index_key(*where)}") from None
    return receipt_of(index, sha256_hex(encoded))


def commit(store: BlobStore, manifest: Manifest, *, newest_epoch_known: int) -> None:
    """Make a generation a checkpoint, if no later one was committed before it.

    Committing the same manifest again is fine. A refused commit leaves nothing that a reader
    would take for a checkpoint.

    Args:
        store: of the run.
        manifest: from `make_manifest`, with the receipts of `write_shard`.
        newest_epoch_known: the newest generation of the run that the caller has heard of.

    Raises:
        StaleEpochError: if a newer epoch is known or committed, or a later step of this epoch is
            committed. Such a generation may have been collected already.
        BlobExistsError: if a different manifest was committed for this step and epoch, or the
            digests of one are there.
        BlobNotFoundError: if a shard of the manifest is not in the store.
        ManifestCorruptError: if the record that is there already is damaged.
    """
    if manifest.epoch < newest_epoch_known:
        raise StaleEpochError(f"newest epoch known is {newest_epoch_known}: {describe(manifest)}")
    key = commit_key(manifest.step, manifest.epoch)
    later = _later_commit(store, manifest)
    if later is not None and key not in store.keys(key):
        raise _stale(manifest, later)
    _require_shards(store, manifest)
    if manifest.grouped:
        _put_digests(store, manifest)
    try:
        store.put(key, encode_manifest(manifest))
    except BlobExistsError:
        found = read_manifest(store, key)
        if found.root != manifest.root:
            raise BlobExistsError(
                f"root is {manifest.root}, committed is {found.root}: {describe(manifest)}"
            ) from None
        return
    # A later commit may have come between the first look and the put. Its collector may then have
    # taken our shards for garbage, so the older of the two gives way.
    later = _later_commit(store, manifest)
    if later is not None:
        store.delete(key)
        raise _stale(manifest, later)


def latest_commit(store: BlobStore) -> tuple[int, int] | None:
    """Return (epoch, step) of the latest commit that the store has ever seen, by epoch, then step.

    Verdicts count too: they outlive the commits they are about. Whatever is not committed and
    comes before this can never be committed.
    """
    commits = [parse_commit_key(key) for key in store.keys(COMMITS)]
    verdicts = [parse_verdict_key(key) for key in store.keys(VERDICTS)]
    return max(((found[1], found[0]) for found in (*commits, *verdicts) if found), default=None)


def newest_epoch(store: BlobStore) -> int:
    """Return the newest epoch of which anything is in the store, 0 if nothing is.

    Shards count that nobody committed, and commits that nobody can read: their keys are taken. A
    writer that starts anew has to have a newer epoch than this.
    """
    latest = latest_commit(store)
    stored = (parse_generation_key(key) for key in store.keys(GENERATIONS))
    return max([latest[0] if latest else 0, *(found[1] for found in stored if found)])


def promised(
    store: BlobStore, manifest: Manifest, shard: int, group: bytes | None = None
) -> ShardReceipt:
    """Return what a checkpoint promises of a shard; of groups one is read for it, a few KB.

    Args:
        store: of the run.
        manifest: of the checkpoint.
        shard: its number.
        group: what `group_of` returned for a shard of the same group, if it was read already.

    Raises:
        BlobNotFoundError, ShardCorruptError, ValueError: as `group_of`.
    """
    if manifest.index_digests:
        return manifest.receipt(shard)
    digests = group_of(store, manifest, shard) if group is None else group
    at = shard * DIGEST_BYTES - manifest.group(shard)[0]
    return manifest.receipt(shard, digests[at : at + DIGEST_BYTES])


def group_of(store: BlobStore, manifest: Manifest, shard: int) -> bytes:
    """Return the digests of the indexes of a shard's group, as they were committed.

    Raises:
        BlobNotFoundError: if they are not there.
        ShardCorruptError: if they are others.
        ValueError: if the manifest has no such shard.
    """
    start, size, expected = manifest.group(shard)
    key = digests_key(manifest.step, manifest.epoch)
    digests = store.get(key, start, size)
    if (found := sha256_hex(digests)) != expected:
        raise ShardCorruptError(
            f"sha-256 from byte {start} on is {found}, manifest says {expected}: {key}"
        )
    return digests


def completed(store: BlobStore, manifest: Manifest) -> Manifest:
    """Return a manifest with the digests of all indexes, for whoever is to read most of them.

    Raises:
        BlobNotFoundError: if they are not there.
        ShardCorruptError: if they are not those that were committed.
    """
    if manifest.index_digests:
        return manifest
    key, size = digests_key(manifest.step, manifest.epoch), manifest.shards * DIGEST_BYTES
    digests = get_small(store, key, size)
    if digests_of_groups(digests, manifest.per_group) != manifest.group_digests:
        raise ShardCorruptError(f"{len(digests)} of {size} bytes, or others: {key}")
    return msgspec.structs.replace(manifest, index_digests=digests)


def fetch_index(
    store: BlobStore, manifest: Manifest, shard: int, group: bytes | None = None
) -> ShardIndex:
    """Return the index of a committed shard, checked against the manifest.

    Args:
        store: of the run.
        manifest: of the checkpoint.
        shard: its number.
        group: the digests of its group, if they were read already; see `promised`.

    Raises:
        BlobNotFoundError: if it is not there.
        ShardCorruptError: if it is not the index that was committed, or if that is not known.
        ForeignCheckpointError: if it is of another run, model or step than the manifest.
        ValueError: if the manifest has no such shard.
    """
    entry = promised(store, manifest, shard, group)
    key = index_key(manifest.step, manifest.epoch, shard)
    data = get_small(store, key, INDEX_BYTES_MAX)
    digest = sha256_hex(data)
    if digest != entry.index_digest:
        raise ShardCorruptError(f"sha-256 is {digest}, manifest says {entry.index_digest}: {key}")
    index = decode_index(data)
    found = (index.run_id, index.model, index.step, index.epoch, index.shard, index.shards)
    expected = (
        *(manifest.run_id, manifest.model, manifest.step, manifest.epoch),
        *(shard, manifest.shards),
    )
    if found != expected:
        raise ForeignCheckpointError(f"index is of {found}, manifest is of {expected}: {key}")
    if index.size != entry.size:
        raise ShardCorruptError(f"size is {index.size}, manifest says {entry.size}: {key}")
    return index


def fetch_shard(store: BlobStore, manifest: Manifest, shard: int) -> tuple[ShardIndex, bytearray]:
    """Return a committed shard, verified down to its last byte.

    Raises:
        BlobNotFoundError, ShardCorruptError, ForeignCheckpointError, ValueError: as `fetch_index`;
            the body's size is compared before memory is taken for it.
    """
    index = fetch_index(store, manifest, shard)
    _require_size(store, index)
    body = bytearray(index.size)
    fetch_body(store, index, body)
    return index, body


def fetch_body(store: BlobStore, index: ShardIndex, buffer: bytearray | memoryview) -> None:
    """Read a shard's body into the caller's buffer, block by block, and verify it there.

    A block is verified while later ones are read.

    Args:
        store: of the run.
        index: of the shard.
        buffer: may be longer than the body.

    Raises:
        BlobNotFoundError: if it is not there.
        ShardCorruptError: naming the first bad chunk; the buffer's content is then worthless, but
            nothing writes into it any more, whatever was raised.
        ValueError: if the buffer is read-only or smaller than `index.size`.
    """
    target = byte_view(buffer)
    if target.readonly or len(target) < index.size:
        raise ValueError(f"buffer must be writable and have {index.size} bytes")

    def room(start: int, size: int) -> memoryview:
        return target[start : start + size]

    # Digest what arrived in the buffer, not what came from the store.
    _fetch(store, index, room, lambda _, __: None)


def pour_body(
    store: BlobStore, index: ShardIndex, write: Callable[[int, memoryview], object]
) -> None:
    """Read a shard's body, block by block, verify it, and hand it on piece by piece.

    For what is to lie in a file: memory that is read into again and again, and written from while a
    core's cache has it, costs half of what a map of the file does, whose pages have to be found,
    cleared and mapped.

    Args:
        store: of the run.
        index: of the shard.
        write: called in order with the place in the body and the bytes of each piece.

    Raises:
        BlobNotFoundError: if it is not there.
        ShardCorruptError: naming the first bad chunk; what was written is worthless then.
    """
    # One for each block that is under way: `ahead` begins none before the oldest is done with.
    rooms = [paged(min(BLOCK_BYTES, index.size)) for _ in range(BLOCKS_AHEAD)]

    def room(start: int, size: int) -> memoryview:
        return rooms[start // BLOCK_BYTES % BLOCKS_AHEAD][:size]

    _fetch(store, index, room, write)


def _fetch(
    store: BlobStore,
    index: ShardIndex,
    room: Callable[[int, int], memoryview],
    digested: Callable[[int, memoryview], object],
) -> None:
    _require_size(store, index)
    key = body_key(index.step, index.epoch, index.shard)

    def read(start: int) -> memoryview:
        piece = room(start, min(BLOCK_BYTES, index.size - start))
        return piece[: get_into(store, key, start, piece)]

    starts = range(0, index.size, BLOCK_BYTES)
    with closing(parallel.ahead(read, starts, BLOCKS_AHEAD, joined=True)) as blocks:
        verify_blocks(index, blocks, digested, to_restore=True)


def check_shard(store: BlobStore, manifest: Manifest, shard: int) -> None:
    """Verify a committed shard where it lies, holding one block of 16 MiB at a time.

    Raises:
        BlobNotFoundError, ShardCorruptError, ForeignCheckpointError, ValueError: as `fetch_shard`.
    """
    index = fetch_index(store, manifest, shard)
    _require_size(store, index)
    verify_blocks(index, body_blocks(store, index))


def body_blocks(store: BlobStore, index: ShardIndex) -> Iterator[bytes]:
    """Yield a shard's body in blocks of 16 MiB, unverified; a few are read ahead."""
    key = body_key(index.step, index.epoch, index.shard)

    def read(start: int) -> bytes:
        return store.get(key, start, min(BLOCK_BYTES, index.size - start))

    return parallel.ahead(read, range(0, index.size, BLOCK_BYTES), BLOCKS_AHEAD)


def _put_body(store: BlobStore, index: ShardIndex, body: Buffer) -> ShardIndex:
    """Store a body, verified; return its index with the CRCs of all blocks."""
    key, verified = body_key(index.step, index.epoch, index.shard), _verified(index, body)
    try:
        store.put(key, byte_view(body)[: index.size])
    except BlobExistsError:
        summed = verified.result()
        _require_same_body(store, summed)
        return summed
    try:
        return verified.result()
    except ShardCorruptError as corrupt:
        # No index leads to it, so nobody has read it.
        try:
            store.delete(key)
        except StorageError as error:
            # Memory that is damaged must not look like a store that is slow.
            raise ShardCorruptError(
                f"{corrupt}; what was stored of it could not be deleted: {error}"
            ) from corrupt
        raise


def _verified(index: ShardIndex, body: Buffer) -> Future[ShardIndex]:
    """Verify a body at once; a large one in a thread, while the store takes it."""
    if index.size > BLOCK_BYTES:
        return parallel.begin(partial(verify, index, body))
    done: Future[ShardIndex] = Future()
    done.set_result(verify(index, body))
    return done


def _require_size(store: BlobStore, index: ShardIndex) -> None:
    key = body_key(index.step, index.epoch, index.shard)
    size = store.size(key)
    if size != index.size:
        raise ShardCorruptError(f"body has {size} bytes, index says {index.size}: {key}")


def _require_same_body(store: BlobStore, index: ShardIndex) -> None:
    try:
        _require_size(store, index)
        verify_blocks(index, body_blocks(store, index))
    except ShardCorruptError as error:
        key = body_key(index.step, index.epoch, index.shard)
        raise BlobExistsError(f"another body is stored ({error}): {key}") from error


def _require_shards(store: BlobStore, manifest: Manifest) -> None:
    """Check by one listing that every shard is there; their bytes were verified on the way in."""
    there = set(store.keys(generation_prefix(manifest.step, manifest.epoch)))
    for shard in range(manifest.shards):
        for key_of in (body_key, index_key):
            key = key_of(manifest.step, manifest.epoch, shard)
            if key not in there:
                raise BlobNotFoundError(f"shard {shard} is not in the store: {key}")


def _put_digests(store: BlobStore, manifest: Manifest) -> None:
    """Put the digests of all indexes where the record will lead to, which it then may."""
    key, ours = digests_key(manifest.step, manifest.epoch), completed(store, manifest).index_digests
    try:
        store.put(key, ours)
    except BlobExistsError:
        if store.get(key, 0, len(ours) + 1) != ours:
            raise BlobExistsError(f"other digests are stored: {key}") from None


def _later_commit(store: BlobStore, manifest: Manifest) -> tuple[int, int] | None:
    latest = latest_commit(store)
    return latest if latest and latest > (manifest.epoch, manifest.step) else None


def _stale(manifest: Manifest, later: tuple[int, int]) -> StaleEpochError:
    return StaleEpochError(
        f"step {later[1]} of epoch {later[0]} was committed before: {describe(manifest)}"
    )
