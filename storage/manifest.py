"""Names the blobs of a checkpoint and describes the record that commits it.

A manifest lists every shard by size and index digest, so that whoever trusts the manifest can check
every byte of the checkpoint. A checkpoint exists when its manifest is stored under `commit_key`.

Of more than `GROUPS_MAX` shards the digests lie in a blob of their own, beside the shards, and the
record has one digest for each group of them: thousands of nodes read it at once, each for the sake
of eight shards.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby, pairwise
from operator import attrgetter

import msgspec
import xxhash

from storage import keys
from storage.blob import BlobStore, get_small
from storage.digest import Buffer, sha256_hex
from storage.errors import ForeignCheckpointError, ManifestCorruptError, UnsupportedVersionError
from storage.shard import Extra, ShardIndex

VERSION, GROUPED = 2, 3
"""Of records: with the digest of each index, and with digests of groups of them."""
GROUPS_MAX = 2048
"""A record has at most so many digests, which are 87 KB."""
STEP_MAX = 9_000_000_000_000_000
COMMITS = "commits/"
GENERATIONS = "gen/"
VERDICTS = "verdicts/"

MANIFEST_BYTES_MAX = 64 * 1024 * 1024
DIGEST_BYTES = 32
"""Of a SHA-256."""
SHARDS_MAX = MANIFEST_BYTES_MAX // DIGEST_BYTES


class ShardReceipt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Says that a shard is durable: its number, its body's bytes, its index's SHA-256."""

    shard: int
    size: int
    index_digest: str


class Manifest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A committed, or about to be committed, checkpoint.

    Shards are columns, not rows: of 16,384 of them a row each would make 1.9 MB, which every reader
    of a listing would read.

    Attributes:
        layout: what a resumed run must know of how the state was cut (mesh, rule); free-form.
        state_digest: `digest.render` over the whole state, or empty if it was not computed. It is
            the same for every layout.
        sizes: bytes of the bodies, in order of shards, as runs of (shards, bytes of each). Few
            differ: a state is cut into equal parts.
        index_digests: SHA-256 of the indexes, one after the other, 32 bytes each, in order of
            shards; base64 in JSON. Of groups it is not in the record but under `digests_key`, and
            empty here as long as nobody has read that (`commit.completed`).
        root: SHA-256 of `index_digests`, or of `group_digests`; two checkpoints with one root have
            equal bytes.
        per_group: how many shards a group has, the last one maybe fewer; 1 without groups.
        group_digests: SHA-256 of what each group has of `index_digests`, as those are written.
        checksum: SHA-256 of this record, encoded with an empty checksum.
    """

    version: int
    run_id: str
    model: str
    step: int
    epoch: int
    shards: int
    layout: Extra
    state_digest: str
    sizes: tuple[tuple[int, int], ...]
    index_digests: bytes
    root: str
    checksum: str
    per_group: int = 1
    group_digests: bytes = b""

    @property
    def grouped(self) -> bool:
        """Whether the digests of indexes are not in the record."""
        return bool(self.group_digests)

    def group(self, shard: int) -> tuple[int, int, str]:
        """Return where in `index_digests` the group of a shard is, how many bytes, their SHA-256.

        Raises:
            ValueError: if there is no such shard.
        """
        self._require(shard)
        number = shard // self.per_group
        size = min(self.per_group, self.shards - number * self.per_group) * DIGEST_BYTES
        digest = self.group_digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        return number * self.per_group * DIGEST_BYTES, size, digest.hex()

    def shard_sizes(self) -> Iterator[int]:
        """Yield the bytes of each body, in order of shards."""
        return (size for count, size in self.sizes for _ in range(count))

    @property
    def size(self) -> int:
        """Bytes of all bodies together."""
        return sum(count * size for count, size in self.sizes)

    def receipt(self, shard: int, digest: bytes | None = None) -> ShardReceipt:
        """Return what is promised of a shard.

        Args:
            shard: its number.
            digest: of its index; may be left out where `index_digests` has it.

        Raises:
            ValueError: if there is no such shard.
        """
        self._require(shard)
        ends = accumulate(count for count, _ in self.sizes)
        size = next(run[1] for run, end in zip(self.sizes, ends, strict=True) if shard < end)
        return self._receipt(shard, size, digest)

    def receipts(self) -> Iterator[ShardReceipt]:
        """Yield what is promised of each shard, in order of shards."""
        for shard, size in enumerate(self.shard_sizes()):
            yield self._receipt(shard, size)

    def _receipt(self, shard: int, size: int, digest: bytes | None = None) -> ShardReceipt:
        if digest is None:
            digest = self.index_digests[shard * DIGEST_BYTES : (shard + 1) * DIGEST_BYTES]
        assert len(digest) == DIGEST_BYTES, "the digests of groups were not read"
        return ShardReceipt(shard=shard, size=size, index_digest=digest.hex())

    def _require(self, shard: int) -> None:
        if not 0 <= shard < self.shards:
            raise ValueError(f"shard is {shard}, must be in 0..{self.shards - 1}")


def make_manifest(
    receipts: Iterable[ShardReceipt],
    *,
    run_id: str,
    model: str,
    step: int,
    epoch: int,
    layout: Extra | None = None,
    state_digest: str = "",
) -> Manifest:
    """Return the manifest of a generation whose shards are all durable.

    Args:
        receipts: one per shard, in any order; their number is the shard count.
        run_id: of the run that wrote the shards.
        model: fingerprint of the architecture.
        step: the training step the state belongs to, in [0, 9e15].
        epoch: the run's generation that wrote it, the fencing token.
        layout: see `Manifest`.
        state_digest: see `Manifest`.

    Raises:
        ValueError: if there is no shard, or a shard is missing or there twice, a digest is none, or
            step or epoch are out of range.
    """
    entries = tuple(sorted(receipts, key=attrgetter("shard")))
    numbers = [entry.shard for entry in entries]
    if not numbers or numbers != list(range(len(numbers))):
        missing = sorted(set(range(len(numbers))) - set(numbers))
        raise ValueError(f"{len(numbers)} receipts must be of shards 0 and up, missing {missing}")
    if not 0 <= step <= STEP_MAX or epoch < 0:
        raise ValueError(f"step {step} and epoch {epoch} must be 0 or more, the step up to 9e15")
    digests = b"".join(map(_digest, entries))
    per_group = -(-len(entries) // GROUPS_MAX)
    groups = digests_of_groups(digests, per_group) if per_group > 1 else b""
    manifest = Manifest(
        version=GROUPED if groups else VERSION,
        run_id=run_id,
        model=model,
        step=step,
        epoch=epoch,
        shards=len(entries),
        layout=layout or {},
        state_digest=state_digest,
        sizes=_runs(entry.size for entry in entries),
        index_digests=digests,
        root=sha256_hex(groups or digests),
        checksum="",
        per_group=per_group,
        group_digests=groups,
    )
    return msgspec.structs.replace(manifest, checksum=_checksum(manifest))


def read_manifest(store: BlobStore, key: str) -> Manifest:
    """Return the manifest that is stored under a key, checked against itself.

    Raises:
        BlobNotFoundError, BlobTooLargeError: from the store.
        ManifestCorruptError, UnsupportedVersionError: as `decode_manifest`.
    """
    return decode_manifest(get_small(store, key, MANIFEST_BYTES_MAX))


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as canonical JSON: the same manifest gives the same bytes, always."""
    if manifest.grouped:
        manifest = msgspec.structs.replace(manifest, index_digests=b"")
    return msgspec.json.encode(manifest, order="deterministic")


def digests_of_groups(index_digests: bytes, per_group: int) -> bytes:
    """Return the SHA-256 of each group of index digests, one after the other."""
    size = per_group * DIGEST_BYTES
    starts = range(0, len(index_digests), size)
    return b"".join(bytes.fromhex(sha256_hex(index_digests[at : at + size])) for at in starts)


def decode_manifest(data: Buffer) -> Manifest:
    """Read a commit record and check it against itself.

    Raises:
        ManifestCorruptError: if any byte of it is not what was committed.
        UnsupportedVersionError: if it was written in another version of the format.
    """
    try:
        version = _read_version(data).version
        if version not in (VERSION, GROUPED):
            raise UnsupportedVersionError(
                f"manifest has version {version}, known are {VERSION} and {GROUPED}"
            )
        manifest = _read_manifest(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ManifestCorruptError(f"manifest does not decode: {error}") from error
    expected = _checksum(manifest)
    if manifest.checksum != expected:
        raise ManifestCorruptError(
            f"checksum is {manifest.checksum}, content has {expected}: {describe(manifest)}"
        )
    if not _is_consistent(manifest):
        raise ManifestCorruptError(f"manifest contradicts itself: {describe(manifest)}")
    if encode_manifest(manifest) != data:
        raise ManifestCorruptError(f"manifest is not in canonical form: {describe(manifest)}")
    return manifest


def check_identity(
    manifest: Manifest, *, run_id: str | None = None, model: str | None = None
) -> None:
    """Check that a checkpoint is of this run and this model; None accepts any.

    Raises:
        ForeignCheckpointError: saying which of the two differs.
    """
    wanted = (("run", run_id, manifest.run_id), ("model", model, manifest.model))
    for what, expected, found in wanted:
        if expected is not None and expected != found:
            raise ForeignCheckpointError(
                f"{what} is {found}, expected {expected}: {describe(manifest)}"
            )


def receipt_of(index: ShardIndex, digest: str) -> ShardReceipt:
    """Return the receipt of a shard whose index has this digest."""
    return ShardReceipt(shard=index.shard, size=index.size, index_digest=digest)


def generation_prefix(step: int, epoch: int) -> str:
    """Return the prefix of a generation's shards.

    Two digits of a hash come first, because object stores split their load by prefix.
    """
    spread = xxhash.xxh3_64_intdigest(f"{step}-{epoch}".encode()) & 0xFF
    return f"{GENERATIONS}{spread:02x}/{step}-{epoch}/"


def body_key(step: int, epoch: int, shard: int) -> str:
    """Return the key of a shard's body."""
    return f"{generation_prefix(step, epoch)}s{shard}.st"


def index_key(step: int, epoch: int, shard: int) -> str:
    """Return the key of a shard's index."""
    return f"{generation_prefix(step, epoch)}s{shard}.idx"


def digests_key(step: int, epoch: int) -> str:
    """Return the key of the digests of indexes of which the record has only those of groups."""
    return f"{generation_prefix(step, epoch)}digests"


def commit_key(step: int, epoch: int) -> str:
    """Return the key of a commit; the step counts down, so that listings start with the newest."""
    return f"{COMMITS}{STEP_MAX - step:016d}-{epoch}.json"


def verdict_key(step: int, epoch: int, number: int, kind: str) -> str:
    """Return the key of a generation's verdict; numbers count up from 0."""
    return f"{VERDICTS}{step}-{epoch}/{number:06d}-{kind}.json"


def parse_commit_key(key: str) -> tuple[int, int] | None:
    """Return (step, epoch), or None if this is no commit's key."""
    match = keys.COMMIT.fullmatch(key)
    if match is None or int(match[1]) > STEP_MAX:
        return None
    return STEP_MAX - int(match[1]), int(match[2])


def parse_generation_key(key: str) -> tuple[int, int] | None:
    """Return (step, epoch), or None if this is no shard's key."""
    match = keys.GENERATION.fullmatch(key)
    return (int(match[1]), int(match[2])) if match else None


def parse_verdict_key(key: str) -> tuple[int, int, str] | None:
    """Return (step, epoch, kind), or None if this is no verdict's key."""
    match = keys.VERDICT.fullmatch(key)
    return (int(match[1]), int(match[2]), match[4]) if match else None


def describe(manifest: Manifest) -> str:
    """Return the words that name a checkpoint in messages."""
    return f"checkpoint of step {manifest.step}, epoch {manifest.epoch}"


class _Version(msgspec.Struct):
    version: int


# As in storage/shard.py: made before there are threads.
_read_version = msgspec.json.Decoder(_Version).decode
_read_manifest = msgspec.json.Decoder(Manifest).decode


def _digest(entry: ShardReceipt) -> bytes:
    digest = bytes.fromhex(entry.index_digest)
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"index digest is {entry.index_digest!r}, must be a SHA-256: {entry}")
    return digest


def _runs(sizes: Iterable[int]) -> tuple[tuple[int, int], ...]:
    return tuple((len(list(same)), size) for size, same in groupby(sizes))


def _is_consistent(manifest: Manifest) -> bool:
    """Return whether shards, sizes and digests are of one number; takes no memory for a claim."""
    counts = [count for count, _ in manifest.sizes]
    return (
        0 < manifest.shards == sum(counts)
        and all(count > 0 and size >= 0 for count, size in manifest.sizes)
        and all(one[1] != next_[1] for one, next_ in pairwise(manifest.sizes))
        and _has_digests(manifest)
    )


def _has_digests(manifest: Manifest) -> bool:
    if manifest.version == VERSION:
        return (
            (manifest.per_group, manifest.group_digests) == (1, b"")
            and len(manifest.index_digests) == manifest.shards * DIGEST_BYTES
            and manifest.root == sha256_hex(manifest.index_digests)
        )
    return (
        1 < manifest.per_group <= manifest.shards <= SHARDS_MAX
        and manifest.index_digests == b""
        and len(manifest.group_digests) == -(-manifest.shards // manifest.per_group) * DIGEST_BYTES
        and manifest.root == sha256_hex(manifest.group_digests)
    )


def _checksum(manifest: Manifest) -> str:
    return sha256_hex(encode_manifest(msgspec.structs.replace(manifest, checksum="")))
