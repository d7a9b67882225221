"""Brings back the state that a rank continues from: its own shard, or its boxes of another cut.

Its agent has the shard in memory, wherever that came from. Where the run was cut otherwise when the
checkpoint was written, no shard there is the rank's, and it reads what is its own from the durable
tier.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from orchestrator.protocol.rank import Restore, Whole
from orchestrator.worker import RankPhase, UnrestorableError, Worker
from storage import shard
from storage.address import open_store
from storage.blob import BlobStore
from storage.contents import Contents, read_contents
from storage.errors import ForeignCheckpointError, StorageError
from storage.manifest import describe, parse_commit_key, read_manifest
from storage.wrappers import RetryingStore
from trainer import passing
from trainer.checkpoint import Checkpointer, any_index
from trainer.feed import Feed
from trainer.parallel import World

ATTEMPTS_MAX = 10
"""Of what may succeed later, for half a minute: thousands of ranks ask a store that slows them
down. One that is away is for the controller to wait for, which asks it once for all of them."""


def restored(
    worker: Worker, restore: Restore, checkpointer: Checkpointer, feed: Feed, world: World
) -> int:
    """Fill the state of this rank; return the steps behind it.

    Of a state that is cut anew one of those that hold the same shard reads, for all of them.

    Raises:
        MisconfiguredError: if it is of another run, model, sharding or data set.
        UnrestorableError: if the durable tier does not give what was written there.
        StorageError: if a byte in memory is not what was staged.
    """
    if restore.whole is not None:
        try:
            return _cut_anew(worker, restore, restore.whole, checkpointer, feed, world)
        except StorageError as error:
            message = f"{type(error).__name__}: {error}"
            raise UnrestorableError(message, hint=error.hint) from error
    feed.require_same(shard.decode_index(restore.index.encode(), staged=True))
    with worker.restore_reader(restore) as read:
        return checkpointer.restore(restore.index, read)


def _cut_anew(
    worker: Worker,
    restore: Restore,
    whole: Whole,
    checkpointer: Checkpointer,
    feed: Feed,
    world: World,
) -> int:
    def alive(_: int = 0) -> None:
        # Now and then it says that it gets on, and hears whether it is to leave.
        worker.phase(RankPhase.RESTORING)

    def read() -> None:
        store, held = _opened(whole, alive)
        feed.require_same(any_index(held))
        done = checkpointer.recut(store, held, alive)
        if done != restore.step:
            raise ForeignCheckpointError(f"shards are of step {done}, expected {restore.step}")

    if world.layout.dp_replicate == 1:
        read()
        return restore.step
    if passing.reads(world):
        read()
        passing.announce(world)
    else:
        passing.await_reader(world, alive)
    if not passing.pass_on(world, list(checkpointer.tensors())):
        print(  # noqa: T201 - the rank's log
            f"reads step {restore.step}, as replica {passing.reader(world)} did: it came damaged",
            file=sys.stderr,
        )
        read()
    return restore.step


def _opened(whole: Whole, alive: Callable[[int], object]) -> tuple[BlobStore, Contents]:
    if parse_commit_key(whole.commit) is None:
        raise ValueError(f"no key of a commit: {whole.commit!r}")
    store = RetryingStore(open_store(whole.uri), attempts_max=ATTEMPTS_MAX)
    manifest = read_manifest(store, whole.commit)
    if (manifest.step, manifest.epoch) != parse_commit_key(whole.commit):
        raise ForeignCheckpointError(f"record is of another {describe(manifest)}: {whole.commit}")
    return store, read_contents(store, manifest, alive)
