"""Names the blobs of a checkpoint and describes the record that commits it.

A manifest lists every shard by size and index digest, so that whoever trusts the manifest can check
every byte of the checkpoint. A checkpoint exists when its manifest is stored under `commit_key`.
"""

from collections.abc import Iterable
from operator import attrgetter

import msgspec
import xxhash

from storage import keys
from storage.blob import BlobStore, get_small
from storage.digest import Buffer, sha256_hex
from storage.errors import ForeignCheckpointError, ManifestCorruptError, UnsupportedVersionError
from storage.shard import Extra, ShardIndex

VERSION = 1
STEP_MAX = 9_000_000_000_000_000
COMMITS = "commits/"
GENERATIONS = "gen/"
VERDICTS = "verdicts/"

MANIFEST_BYTES_MAX = 64 * 1024 * 1024


class ShardReceipt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Says that a shard is durable: its number, its body's bytes, its index's SHA-256."""

    shard: int
    size: int
    index_digest: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A committed, or about to be committed, checkpoint.

    Attributes:
        layout: what a resumed run must know of how the state was cut (mesh, rule); free-form.
        state_digest: `digest.render` over the whole state, or empty if it was not computed. It is
            the same for every layout.
        entries: one per shard, ascending by shard.
        root: SHA-256 over the index digests; two checkpoints with one root have equal bytes.
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
    entries: tuple[ShardReceipt, ...]
    root: str
    checksum: str


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
        ValueError: if there is no shard, or a shard is missing or there twice, or step or epoch
            are out of range.
    """
    entries = tuple(sorted(receipts, key=attrgetter("shard")))
    numbers = [entry.shard for entry in entries]
    if not numbers or numbers != list(range(len(numbers))):
        missing = sorted(set(range(len(numbers))) - set(numbers))
        raise ValueError(f"{len(numbers)} receipts must be of shards 0 and up, missing {missing}")
    if not 0 <= step <= STEP_MAX or epoch < 0:
        raise ValueError(f"step {step} and epoch {epoch} must be 0 or more, the step up to 9e15")
    manifest = Manifest(
        version=VERSION,
        run_id=run_id,
        model=model,
        step=step,
        epoch=epoch,
        shards=len(entries),
        layout=layout or {},
        state_digest=state_digest,
        entries=entries,
        root=_root(entries),
        checksum="",
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
    return msgspec.json.encode(manifest, order="deterministic")


def decode_manifest(data: Buffer) -> Manifest:
    """Read a commit record and check it against itself.

    Raises:
        ManifestCorruptError: if any byte of it is not what was committed.
        UnsupportedVersionError: if it was written in another version of the format.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version != VERSION:
            raise UnsupportedVersionError(f"manifest has version {version}, known is {VERSION}")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ManifestCorruptError(f"manifest does not decode: {error}") from error
    expected = _checksum(manifest)
    if manifest.checksum != expected:
        raise ManifestCorruptError(
            f"checksum is {manifest.checksum}, content has {expected}: {describe(manifest)}"
        )
    numbers = [entry.shard for entry in manifest.entries]
    if numbers != list(range(manifest.shards)) or manifest.root != _root(manifest.entries):
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


def _root(entries: Iterable[ShardReceipt]) -> str:
    return sha256_hex("".join(entry.index_digest for entry in entries).encode())


def _checksum(manifest: Manifest) -> str:
    return sha256_hex(encode_manifest(msgspec.structs.replace(manifest, checksum="")))
