"""Two replicas of two ranks take up a state that was saved in another cut.

    python -m tests.programs.passed FOLDER CUT SIZE WAY...

Each rank leaves FOLDER/RANK.json: of each way, how often it asked the store for anything, and
whether it holds what is its own then, to the bit.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.protocol.layout import Layout
from storage.address import open_store
from storage.blob import BlobStore
from storage.local import LocalStore
from storage.manifest import commit_key
from storage.wrappers import CountingStore
from tests.cuts import Same, Seated, rank_of, ranks, stored, whole
from tests.programs import forked
from trainer import parallel, passing, restoring

REPLICAS = 2
DAMAGED = 0
"""The shard that comes damaged to whoever does not read it."""
WAYS = ("well", "damaged on its way", "read slowly")


def find(folder: Path, ways: list[str], world: parallel.World) -> dict[str, Any]:
    found = {}
    for way in ways:
        own, right = rank_of(world, empty=True), rank_of(world)
        stores: list[CountingStore] = []
        worker = Seated()
        with _as_told(way, world, stores):
            told = whole(str(folder / "checkpoints"), commit_key(5, 2))
            restoring.restored(worker, told, own.checkpointer, Same(), world)
        pairs = zip(own.checkpointer.tensors(), right.checkpointer.tensors(), strict=True)
        found[way] = {
            "asked": sum(store.reads for store in stores),
            "right": all(torch.equal(one, other) for (_, one), (_, other) in pairs),
            "reads": passing.reads(world),
            "alive": worker.alive,
        }
        world.gather([0.0])
        # Each way is a generation of its own.
        world.store.delete_key(f"shard-{world.shard}-is-read")
        world.gather([0.0])
    return found


@contextlib.contextmanager
def _as_told(way: str, world: parallel.World, stores: list[CountingStore]) -> Iterator[None]:
    def opened(uri: str) -> BlobStore:
        if way == "read slowly":
            time.sleep(1.0)
        stores.append(CountingStore(open_store(uri)))
        return stores[-1]

    broadcast: Callable[..., Any] = dist.broadcast

    def damaged(piece: Tensor, **more: Any) -> dist.Work:
        sent = broadcast(piece, **more)
        sent.wait()
        if not passing.reads(world):
            piece[0] += 1
        return sent

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(restoring, "open_store", opened))
        if way == "damaged on its way" and world.shard == DAMAGED:
            patches.enter_context(mock.patch.object(passing.dist, "broadcast", damaged))
        yield


def main(folder: Path, cut: str, size: str, *ways: str) -> int:
    assert (cut, int(size)) == ("dp_shard", 2)
    with contextlib.ExitStack() as ends:
        stored(ranks(3, ends), LocalStore(folder / "checkpoints"))
    layout = Layout(dp_replicate=REPLICAS, dp_shard=2)
    return forked.conduct(folder, layout, lambda world: find(folder, list(ways), world))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
