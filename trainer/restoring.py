"""Brings back the state that a rank continues from: its own shard, or its boxes of another cut.

Its agent has the shard in memory, wherever that came from. Where the run was cut otherwise when the
checkpoint was written, no shard there is the rank's, and it reads what is its own from the durable
tier.
"""

from __future__ import annotations

from orchestrator.protocol.rank import Restore, Whole
from orchestrator.worker import RankPhase, Worker
from storage import shard
from storage.address import open_store
from storage.blob import BlobStore
from storage.contents import Contents, read_contents
from storage.errors import ForeignCheckpointError
from storage.manifest import describe, parse_commit_key, read_manifest
from storage.wrappers import RetryingStore
from trainer.checkpoint import Checkpointer, any_index
from trainer.feed import Feed

ATTEMPTS_MAX = 360
"""Of what may succeed later, for an hour: a rank that ends for it looks like a faulty program. How
long it may take is for the controller to say, which breaks the recovery off and asks the store."""


def restored(worker: Worker, restore: Restore, checkpointer: Checkpointer, feed: Feed) -> int:
    """Fill the state of this rank; return the steps behind it.

    Raises:
        MisconfiguredError: if it is of another run, model, sharding or data set.
        StorageError: if a byte is not what was staged, or a store does not answer.
    """
    if restore.whole is not None:
        store, held = _opened(restore.whole)
        feed.require_same(any_index(held))
        # Between blocks it hears whether it is to leave.
        done = checkpointer.recut(store, held, lambda _: worker.phase(RankPhase.RESTORING))
        if done != restore.step:
            raise ForeignCheckpointError(f"shards are of step {done}, expected {restore.step}")
        return done
    feed.require_same(shard.decode_index(restore.index.encode(), staged=True))
    with worker.restore_reader(restore) as read:
        return checkpointer.restore(restore.index, read)


def _opened(whole: Whole) -> tuple[BlobStore, Contents]:
    if parse_commit_key(whole.commit) is None:
        raise ValueError(f"no key of a commit: {whole.commit!r}")
    store = RetryingStore(open_store(whole.uri), attempts_max=ATTEMPTS_MAX)
    manifest = read_manifest(store, whole.commit)
    if (manifest.step, manifest.epoch) != parse_commit_key(whole.commit):
        raise ForeignCheckpointError(f"record is of another {describe(manifest)}: {whole.commit}")
    return store, read_contents(store, manifest)
