"""Shards as ranks stage them, and nodes that keep them."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.agent.calling import PeerClient
from orchestrator.agent.keeper import Keeper
from orchestrator.agent.wire import Wire
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import BadCopy, MendedCopy
from orchestrator.protocol.rank import Restore, Staged
from storage.shard import (
    Chunk,
    ShardIndex,
    ShardMeta,
    ShardPlan,
    StagedChunk,
    encode_index,
    plan,
    seal,
)

CHUNKS = 8
TOKEN = "shown by every agent"  # noqa: S105 - of tests
HERE, THERE = NodeId("node-0"), NodeId("node-1")
RANK, STEP, GENERATION = Rank(0), Step(7), Generation(2)
OTHER = Rank(3)
"""Of another replica; to the keeper, which shard it has is only its name."""


def layout(size: int = 100_000) -> ShardPlan:
    """Return the plan of a shard with about `size` bytes of data."""
    items = size // 4 // CHUNKS
    return plan(
        Chunk(
            fqn=f"layers.{i}.w",
            state="param",
            dtype="F32",
            shape=(items,),
            global_shape=(items,),
            offset=(0,),
        )
        for i in range(CHUNKS)
    )


def sealed(
    rank: int, step: int, generation: int, size: int = 100_000, shards: int = 4
) -> tuple[ShardIndex, bytearray]:
    """Return a shard whose bytes depend on rank, step and generation."""
    shape = layout(size)
    body = bytearray(shape.size)
    noise = np.random.default_rng((rank, step, generation))
    for view in shape.views(body).values():
        view[:] = noise.bytes(len(view))
    meta = ShardMeta(
        run_id="run-7", model="llama-test", step=step, epoch=generation, shard=rank, shards=shards
    )
    return seal(shape, body, meta), body


def stage(
    memory: Path, rank: int, step: int, generation: int, slot: int = 0, size: int = 100_000
) -> Staged:
    """Write a shard to a staging slot, as a rank does; return what the rank says then."""
    index, body = sealed(rank, step, generation, size)
    path = memory / f"rank-{rank:05d}.slot-{slot}"
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(body)
    return Staged(
        generation=Generation(generation),
        step=Step(step),
        slot=slot,
        index=encode_index(index).decode(),
        durable=False,
    )


class Node:
    """A keeper with its folder, its address and what it said."""

    def __init__(self, memory: Path, *, transfer_s: float = 60.0) -> None:
        memory.mkdir()
        self.memory = memory
        self.keeper = Keeper(memory, token=TOKEN, transfer_s=transfer_s)
        self.held: list[tuple[int, int, int]] = []
        self.freed: list[tuple[int, int]] = []
        self.keeper.on_held = self._note
        self.keeper.on_freed = lambda rank, slot: self.freed.append((rank, slot))
        self.address = ""

    def begin(self, generation: int, peers: "dict[NodeId, Node]", restore: int | None) -> None:
        self.keeper.begin(
            Generation(generation),
            {name: node.address for name, node in peers.items()},
            None if restore is None else Step(restore),
        )

    def stage(self, rank: int, step: int, generation: int, slot: int = 0, **more: int) -> None:
        self.keeper.staged(Rank(rank), stage(self.memory, rank, step, generation, slot, **more))

    def _note(self, generation: Generation) -> None:
        """What is held, as the controller was last told."""
        self.held = [(generation, h.rank, h.step) for h in self.keeper.holdings()]

    def files(self) -> list[str]:
        return sorted(path.name for path in self.memory.iterdir())

    def damage(self, pattern: str) -> None:
        (path,) = self.memory.glob(pattern)
        with path.open("r+b") as file:
            file.seek(50_000)
            byte = file.read(1)[0]
            file.seek(50_000)
            file.write(bytes([byte ^ 1]))


class Heard:
    """What a node's keeper said of bad bytes."""

    def __init__(self, node: Node) -> None:
        self.mended: list[MendedCopy] = []
        self.lacking: list[BadCopy] = []
        node.keeper.checking.on_mended = self.mended.append
        node.keeper.checking.on_lacking.append(self.lacking.append)


def chunks() -> tuple[StagedChunk, ...]:
    """Return the chunks of the shard of rank 0 after seven steps."""
    return sealed(RANK, STEP, GENERATION)[0].chunks


def spoil(node: Node, *places: int) -> Path:
    """Flip a bit at each of these bytes of the one shard that a node holds."""
    (path,) = node.memory.iterdir()
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 4]))
    return path


def content(restore: Restore) -> bytes:
    """Return what a rank that is told to restore from there will read."""
    return Path(restore.path).read_bytes()


class Clock:
    """Lets the time of the running loop go on at once, by `ahead_s`."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def start(self) -> None:
        """Keep the clock of the loop that runs now."""
        loop = asyncio.get_running_loop()
        real = loop.time
        loop.time = lambda: real() + self.ahead_s  # type: ignore[method-assign]


@contextlib.contextmanager
def damaged_on_the_way(patch: pytest.MonkeyPatch, *places: int) -> Iterator[None]:
    """Flip a bit at each of these bytes of every body that comes as a whole."""
    receive = Wire.receive_file

    async def damaged(self: Wire, descriptor: int, size: int) -> None:
        await receive(self, descriptor, size)
        for place in places:
            byte = os.pread(descriptor, 1, place)[0]
            os.pwrite(descriptor, bytes([byte ^ 8]), place)

    with patch.context() as context:
        context.setattr(Wire, "receive_file", damaged)
        yield


@contextlib.asynccontextmanager
async def two(tmp_path: Path) -> AsyncIterator[tuple[Node, Node]]:
    """Two nodes in one generation that know each other."""
    one, other = Node(tmp_path / "here"), Node(tmp_path / "there")
    try:
        for node in (one, other):
            node.address = await node.keeper.open()
        for node in (one, other):
            node.begin(GENERATION, {HERE: one, THERE: other}, None)
        yield one, other
    finally:
        await asyncio.gather(one.keeper.close(), other.keeper.close())
        assert (one.files(), other.files()) == ([], [])


@contextlib.asynccontextmanager
async def calling(tmp_path: Path, address: str, size: int = 100_000) -> AsyncIterator[Node]:
    """A node that knows a peer of that address, and has a shard: only this when all is over."""
    node = Node(tmp_path / "here")
    await node.keeper.open()
    node.keeper.begin(GENERATION, {THERE: address}, None)
    node.stage(0, 7, 2, size=size)
    try:
        yield node
        assert node.files() == ["rank-00000.slot-0"]
        assert node.keeper._shelf.require(RANK, STEP).pins == 0
    finally:
        await node.keeper.close()


async def settled(
    condition: Callable[[], bool], within_s: float = 5.0, pause_s: float = 0.005
) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(pause_s)


def picked(patch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list to which each piece that is asked for by itself will be added."""
    pieces: list[tuple[int, int]] = []
    pick = PeerClient.pick

    async def counted(self: PeerClient, address: str, wanted: Any, start: int, size: int) -> bytes:
        pieces.append((start, size))
        return await pick(self, address, wanted, start, size)

    patch.setattr(PeerClient, "pick", counted)
    return pieces
