"""Reads checkpoints back and says what is wrong with them: which file, which chunk, what was there.

Where a reader on its way to a restore stops at the first bad byte, this looks at everything.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import msgspec

from storage.blob import BlobStore
from storage.catalog import SHARDS_AT_ONCE, Catalog, CommitRecord
from storage.commit import body_blocks, completed, fetch_index
from storage.digest import Buffer, digest_stream
from storage.errors import BlobNotFoundError, StorageError, is_of_content
from storage.manifest import Manifest, body_key, commit_key, digests_key, index_key
from storage.parallel import each
from storage.shard import ShardIndex
from storage.verdicts import SUSPECT, Standing, Trust

DAMAGES_TOLD = 3
HEADER = "header"


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not as it was committed.

    Attributes:
        key: of the file.
        chunk: which chunk of a body, `header` for what is before the first, empty for the whole.
        expected: what the commit vouches for.
        found: what is there.
    """

    key: str
    chunk: str
    expected: str
    found: str

    def __str__(self) -> str:
        """Return it on one line."""
        where = f"{self.chunk} of {self.key}" if self.chunk else self.key
        return f"expected {self.expected}, found {self.found}: {where}"


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """What came of reading a checkpoint back; no damages if every byte is what was staged.

    With a fault nothing was read: that of its record, which another version of the program may know
    if it is unsupported.
    """

    step: int
    epoch: int
    damages: tuple[Damage, ...]
    fault: str = ""
    unsupported: bool = False


def examine(
    store: BlobStore, manifest: Manifest, *, read: Callable[[int], None] = lambda _bytes: None
) -> list[Damage]:
    """Read a checkpoint, a few blocks of 16 MiB at a time, and return all that is wrong with it.

    Args:
        store: of the run.
        manifest: of the checkpoint.
        read: called with the number of bytes whenever some were read, for whoever watches; from
            any thread.

    Raises:
        StorageError: if the store does not answer or refuses; that says nothing of the bytes.
    """
    try:
        whole = completed(store, manifest)
    except StorageError as error:
        if not is_of_content(error):
            raise
        # Without them no index, and so no body, can be told to be what was committed.
        expected, key = "the digests of all indexes", digests_key(manifest.step, manifest.epoch)
        return [Damage(key=key, chunk="", expected=expected, found=_found(error))]

    def of_shard(shard: int) -> list[Damage]:
        return list(_examine_shard(store, whole, shard, read))

    by_shard = each(of_shard, range(manifest.shards), at_once=SHARDS_AT_ONCE)
    return [damage for damages in by_shard for damage in damages]


def _found(error: StorageError) -> str:
    return "nothing" if isinstance(error, BlobNotFoundError) else str(error)


def scrub_all(
    catalog: Catalog,
    *,
    again: bool = False,
    read: Callable[[int], None] = lambda _bytes: None,
    reading: Callable[[int, int], AbstractContextManager[None]] = lambda _step, _epoch: (
        nullcontext()
    ),
) -> Iterator[Examined]:
    """Scrub every checkpoint that is due, newest first; see `scrub`.

    Args:
        catalog: of the run.
        again: also those whose bytes were verified before; bytes can rot.
        read: as for `examine`.
        reading: entered with the step and epoch of each while it is read, to have a lease of it.
    """
    for record in due(catalog, again=again):
        with reading(record.step, record.epoch):
            examined = scrub(catalog, record, read=read)
        if examined is not None:
            yield examined


def due(catalog: Catalog, *, again: bool = False) -> list[CommitRecord]:
    """Return the checkpoints that a scrub has to read, newest first."""
    standings = catalog.standings()
    return [
        record
        for record in catalog.commits()
        if is_due(record, standings.get((record.step, record.epoch), Standing()), again=again)
    ]


def scrub(
    catalog: Catalog,
    record: CommitRecord,
    *,
    read: Callable[[int], None] = lambda _bytes: None,
) -> Examined | None:
    """Examine a checkpoint, and put on record what came of it.

    What is whole gets the verdict that its bytes are verified. What is damaged becomes suspect, so
    that nobody resumes from it; its bytes stay.

    Args:
        catalog: of the run. Hand one on a `ThrottledStore` to leave bandwidth to the run.
        record: of the checkpoint.
        read: as for `examine`.

    Returns:
        What came of it; None if it was collected while it was read.

    Raises:
        StorageError: if the store does not answer or refuses.
    """
    step, epoch, manifest = record.step, record.epoch, record.manifest
    if manifest is None:
        return unread(record)
    damages = examine(catalog.store, manifest, read=read)
    if damages and not is_there(catalog.store, manifest):
        return None
    _judge(catalog, manifest, damages)
    return Examined(step=step, epoch=epoch, damages=tuple(damages))


def unread(record: CommitRecord) -> Examined:
    """Return what is known of a checkpoint whose record can not be read."""
    return Examined(
        step=record.step,
        epoch=record.epoch,
        damages=(),
        fault=record.fault,
        unsupported=record.unsupported,
    )


def is_due(record: CommitRecord, standing: Standing, *, again: bool) -> bool:
    """Return whether a scrub reads a checkpoint: not if it is barred, or verified already."""
    if record.superseded or standing.barred:
        return False
    return again or not standing.read_back


def _judge(catalog: Catalog, manifest: Manifest, damages: list[Damage]) -> None:
    if not damages:
        catalog.judge(manifest.step, manifest.epoch, Trust.BYTES_VERIFIED.kind, "scrubbed")
        return
    told = "; ".join(map(str, damages[:DAMAGES_TOLD]))
    more = f"; and {len(damages) - DAMAGES_TOLD} more" if len(damages) > DAMAGES_TOLD else ""
    catalog.judge(manifest.step, manifest.epoch, SUSPECT, f"scrub found {told}{more}")


def is_there(store: BlobStore, manifest: Manifest) -> bool:
    """Return whether a checkpoint is still there; the record goes before the shards."""
    key = commit_key(manifest.step, manifest.epoch)
    return key in store.keys(key)


def _examine_shard(
    store: BlobStore, manifest: Manifest, shard: int, read: Callable[[int], None]
) -> Iterator[Damage]:
    where = (manifest.step, manifest.epoch, shard)
    try:
        index = fetch_index(store, manifest, shard)
    except BlobNotFoundError:
        yield Damage(key=index_key(*where), chunk="", expected="an index", found="nothing")
        return
    except StorageError as error:
        if not is_of_content(error):
            raise
        digest = manifest.receipt(shard).index_digest
        yield Damage(
            key=index_key(*where), chunk="", expected=f"sha-256 {digest}", found=str(error)
        )
        return
    key = body_key(*where)
    try:
        size = store.size(key)
        if size != index.size:
            expected, found = f"{index.size} bytes", f"{size} bytes"
            yield Damage(key=key, chunk="", expected=expected, found=found)
            return
        yield from _examine_body(index, key, _watched(body_blocks(store, index), read))
    except BlobNotFoundError:
        yield Damage(key=key, chunk="", expected=f"{index.size} bytes", found="nothing")
    except StorageError as error:
        if not is_of_content(error):
            raise
        yield Damage(key=key, chunk="", expected=f"{index.size} bytes", found=str(error))


def _examine_body(index: ShardIndex, key: str, blocks: Iterator[Buffer]) -> Iterator[Damage]:
    measured = digest_stream([(chunk.start, chunk.end) for chunk in index.chunks], blocks)
    bad = [
        Damage(
            key=key,
            chunk=chunk.name,
            expected=f"xxh3-128 {chunk.xxh3_128}",
            found=f"xxh3-128 {found}",
        )
        for chunk, found in zip(index.chunks, measured.spans, strict=False)
        if chunk.xxh3_128 != found
    ]
    yield from bad
    if measured.size != index.size:
        expected, found_bytes = f"{index.size} bytes", f"{measured.size} bytes"
        yield Damage(key=key, chunk="", expected=expected, found=found_bytes)
    elif not bad:
        for expected_crc, crc in zip(index.crc32c, measured.crcs, strict=True):
            if expected_crc != crc:
                # Every chunk is intact, so it is what lies before them.
                expected, found = f"crc32c {expected_crc:08x}", f"crc32c {crc:08x}"
                yield Damage(key=key, chunk=HEADER, expected=expected, found=found)


def _watched(blocks: Iterator[bytes], read: Callable[[int], None]) -> Iterator[bytes]:
    for block in blocks:
        yield block
        read(len(block))
