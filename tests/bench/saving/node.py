"""A node's agent for the benchmark of checkpoints, in a process of its own.

    python -m tests.bench.saving.node MEMORY URI

Its keeper, its durable tier and the commit are the product's; only the socket between rank and
agent is a pipe here, with one JSON text on each line.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import msgspec

from orchestrator.agent.durable import DurableCheckpoint, DurableShard, DurableTier
from orchestrator.agent.keeper import Keeper
from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.rank import Restore, Staged
from storage.commit import commit
from storage.manifest import ShardReceipt, commit_key, make_manifest
from storage.shard import ShardIndex, decode_index
from tests.runs import REPOSITORY

RANK = Rank(0)
LINE_BYTES_MAX = 64 << 20


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Enter a generation, and forget what older ones staged."""

    generation: Generation


class Save(msgspec.Struct, frozen=True, tag=True):
    """Make what was staged a checkpoint."""

    staged: Staged


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Have a checkpoint in memory, for generation `generation` to start from."""

    step: Step
    epoch: Generation
    generation: Generation


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is done; it took so many seconds of this process's time on a core."""

    core_s: float
    restore: Restore | None = None


Order = Begin | Save | Fetch


class Node:
    """The process, as the rank has it.

    Args:
        memory: its folder in shared memory.
        uri: of the durable tier.
    """

    def __init__(self, memory: Path, uri: str) -> None:
        memory.mkdir()
        command = [sys.executable, "-m", "tests.bench.saving.node", str(memory), uri]
        self.memory = memory
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY
        )
        self.pid = self._process.pid
        self.hear()

    def say(self, order: Order) -> None:
        """Send an order. Any thread."""
        _put(self._process.stdin, order)

    def hear(self) -> Done:
        """Wait until it is carried out."""
        assert self._process.stdout is not None
        return msgspec.json.decode(self._process.stdout.readline(), type=Done)

    def ask(self, order: Order) -> Done:
        """Have an order carried out."""
        self.say(order)
        return self.hear()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


class Agent:
    """What runs in the process."""

    def __init__(self, memory: Path, uri: str) -> None:
        self._keeper = Keeper(memory, token="of a benchmark")  # noqa: S106 - nobody else listens
        self._store = DurableTier(uri).store

    async def serve(self) -> None:
        """Carry out orders until standard input ends."""
        await self._keeper.open()
        orders = asyncio.StreamReader(limit=LINE_BYTES_MAX)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
        )
        _put(sys.stdout.buffer, Done(0.0))
        while line := await orders.readline():
            order = msgspec.json.decode(line, type=Order)
            before_s = time.process_time()
            restore = await self._carry_out(order)
            _put(sys.stdout.buffer, Done(time.process_time() - before_s, restore))
        await self._keeper.close()

    async def _carry_out(self, order: Order) -> Restore | None:
        match order:
            case Begin(generation):
                self._keeper.begin(generation, {}, None)
            case Save(staged):
                await self._save(staged)
            case Fetch(step, epoch, generation):
                self._keeper.begin(generation, {}, step)
                where = DurableShard(DurableCheckpoint(self._store, commit_key(step, epoch)), 0)
                restore, tier = await self._keeper.prepare(RANK, step, "", where)
                assert tier == "durable", tier
                return restore
        return None

    async def _save(self, staged: Staged) -> None:
        self._keeper.staged(RANK, staged)
        step, generation = staged.step, staged.generation
        receipt, _ = await self._keeper.write(self._store, RANK, step, generation)
        index: ShardIndex = decode_index(staged.index.encode(), staged=True)
        manifest = make_manifest(
            [
                ShardReceipt(
                    shard=receipt.shard, size=receipt.size, index_digest=receipt.index_digest
                )
            ],
            run_id=index.run_id,
            model=index.model,
            step=step,
            epoch=generation,
        )
        await asyncio.to_thread(commit, self._store, manifest, newest_epoch_known=generation)


def _put(stream: IO[bytes] | None, message: Any) -> None:
    assert stream is not None
    stream.write(msgspec.json.encode(message) + b"\n")
    stream.flush()


if __name__ == "__main__":
    asyncio.run(Agent(Path(sys.argv[1]), sys.argv[2]).serve())
