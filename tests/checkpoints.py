"""Small checkpoints: two shards of one tensor, put into a store."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest

from storage import manifest as manifests
from storage.blob import BlobStore
from storage.catalog import Catalog
from storage.commit import commit, write_shard
from storage.contents import Beside
from storage.errors import ForeignFormatError
from storage.manifest import Manifest, make_manifest
from storage.shard import Chunk, Extra, ShardMeta, plan, seal
from storage.transfer import Part, bring_in

SHARDS = 2
LAYOUT = plan(
    Chunk(fqn=name, state="param", dtype="U8", shape=(64,), global_shape=(128,), offset=(0,))
    for name in ("v", "w")
)


def written(store: BlobStore, step: int, epoch: int = 1, run_id: str = "run") -> Manifest:
    """Write the shards of a checkpoint whose bytes depend on the step; return its manifest."""
    receipts = []
    for shard in range(SHARDS):
        body = bytearray(LAYOUT.size)
        for view in LAYOUT.views(body).values():
            view[:] = bytes([step % 256]) * 64
        extra: Extra = {"step": step}
        meta = ShardMeta(
            run_id=run_id,
            model="m",
            step=step,
            epoch=epoch,
            shard=shard,
            shards=SHARDS,
            extra=extra,
        )
        receipts.append(write_shard(store, seal(LAYOUT, body, meta), body))
    return make_manifest(
        receipts, run_id=run_id, model="m", step=step, epoch=epoch, layout={"dpShard": SHARDS}
    )


@contextlib.contextmanager
def in_groups() -> Iterator[None]:
    """Have manifests made as if two shards were very many: with the digests of groups of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "GROUPS_MAX", 1)
        yield


def committed(store: BlobStore, step: int, epoch: int = 1, run_id: str = "run") -> Manifest:
    """Write a checkpoint and commit it."""
    manifest = written(store, step, epoch, run_id)
    commit(store, manifest, newest_epoch_known=epoch)
    return manifest


def brought_in(store: BlobStore, step: int, *, cut_off: bool = False) -> Manifest:
    """Make a checkpoint of two whole tensors, one in each shard, in an epoch of its own.

    Raises:
        ForeignFormatError: if the second is cut off.
    """
    filled = itertools.count()

    def fill(view: memoryview) -> None:
        if next(filled) and cut_off:
            raise ForeignFormatError("file was cut off meanwhile")
        view[:] = bytes([step % 256]) * 64

    parts = [Part(name, "U8", (64,), (64,), (0,), fill) for name in ("v", "w")]
    return bring_in(store, parts, Beside(), step=step, run_id="run", shard_bytes=64)


def steps_of(store: BlobStore) -> list[tuple[int, int]]:
    """Return step and epoch of every commit, newest first."""
    return [(record.step, record.epoch) for record in Catalog(store).commits()]
