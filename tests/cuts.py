"""States of a few numbers that are saved in one cut, to be taken up in another."""

from contextlib import ExitStack
from typing import NamedTuple

import msgspec
import torch

from orchestrator.protocol.ids import Step
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.rank import Restore, Whole
from orchestrator.worker import Worker
from storage import shard
from storage.blob import BlobStore
from storage.commit import commit, write_shard
from storage.contents import Contents, read_contents
from storage.digest import combine
from storage.manifest import make_manifest
from trainer import parallel
from trainer.checkpoint import Checkpointer
from trainer.feed import Feed
from trainer.optim import STATES, ShardState
from trainer.staging import bytes_of
from trainer.stamp import Cursor, Stamp

CURSOR = Cursor(samples=0, seed=0, seq_len=8, global_batch=2, data="d16e57000000")
STAMP = Stamp("run", "model", 3, CURSOR)
WEIGHTS = {"a": torch.arange(30.0).reshape(5, 6), "b": torch.arange(7.0), "c": torch.ones(1, 1)}


class Rank(NamedTuple):
    shards: list[ShardState]
    checkpointer: Checkpointer
    world: parallel.World


def ranks(cut: int, ends: ExitStack, *, stamp: Stamp = STAMP, empty: bool = False) -> list[Rank]:
    """The ranks of a replica, with the state or with zeros."""
    made = []
    for rank in range(cut):
        world = parallel.World(rank, Layout(dp_shard=cut), torch.device("cpu"))
        ends.callback(world.close)
        made.append(rank_of(world, stamp=stamp, empty=empty))
    return made


def rank_of(world: parallel.World, *, stamp: Stamp = STAMP, empty: bool = False) -> Rank:
    """A rank with its part of the state, or with zeros."""
    shards = []
    for name, weight in WEIGHTS.items():
        parts = weight.chunk(world.shards)
        part = (parts[world.shard] if world.shard < len(parts) else weight[:0]).clone()
        states = [part * 0 if empty else part + number for number in range(len(STATES))]
        shards.append(ShardState(name, torch.nn.Parameter(weight), *states))
    return Rank(shards, Checkpointer(shards, world, stamp), world)


def digest(of: list[Rank]) -> tuple[int, int]:
    return combine([rank.checkpointer.lanes(5) for rank in of])


def stored(of: list[Rank], store: BlobStore) -> Contents:
    receipts = []
    for number, rank in enumerate(of):
        plan = shard.plan(rank.checkpointer.chunks)
        body = bytearray(plan.size)
        for state in STATES:
            for each in rank.shards:
                plan.views(body)[f"{state}/{each.name}"][:] = bytes_of(getattr(each, state))
        meta = shard.ShardMeta(
            run_id="run",
            model="model",
            step=5,
            epoch=2,
            shard=number,
            shards=len(of),
            extra=msgspec.to_builtins(CURSOR.after(5)),
        )
        receipts.append(write_shard(store, shard.seal(plan, body, meta), body))
    manifest = make_manifest(receipts, run_id="run", model="model", step=5, epoch=2)
    commit(store, manifest, newest_epoch_known=2)
    return read_contents(store, manifest)


class Seated(Worker):
    """As far as it takes to restore."""

    def __init__(self) -> None:
        self.alive = 0

    def phase(self, *_: object, **__: object) -> None:
        self.alive += 1


class Same(Feed):
    def __init__(self) -> None:
        self.asked: list[int] = []

    def require_same(self, index: shard.ShardIndex) -> None:
        self.asked.append(index.step)


def whole(uri: str, key: str) -> Restore:
    return Restore(step=Step(5), path="", index="", whole=Whole(uri=uri, commit=key))
