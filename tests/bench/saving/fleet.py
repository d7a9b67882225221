"""Commits checkpoints of 16,384 ranks, whose 2,048 agents are in this process, and lists many.

Agents collect receipts, and say them in messages, as the product's do; the controller's side is its
own vault. A commit reads neither body nor index of a shard, so there is only a bit for each.
"""

from __future__ import annotations

import gc
import json
import queue
import resource
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from orchestrator.agent.impressions import Written
from orchestrator.agent.owed import Owed
from orchestrator.core.decisions import CommitCheckpoint
from orchestrator.core.events import CheckpointCommitted, Event
from orchestrator.protocol.ids import Generation, NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import Begin, Impression, Receipt, ShardsWritten
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import derive
from orchestrator.worlds import heap
from orchestrator.worlds.vault import Vault
from storage.catalog import Catalog
from storage.digest import sha256_hex
from storage.faulty import FaultyStore
from storage.manifest import (
    ShardReceipt,
    body_key,
    commit_key,
    encode_manifest,
    index_key,
    make_manifest,
)
from storage.memory import MemoryStore
from storage.verdicts import Trust
from tests.bench.saving.elsewhere import Elsewhere
from tests.runs import steps_job

RANKS_PER_NODE = 8
BODY_BYTES = 346_000_000
"""Of Llama 3 405B with its optimizer, by 16,384."""
MODEL = "of a benchmark"
EPOCH = Generation(1)
LATENCY_S = 0.02
SETTLED_S = 600.0
LISTED_SHARDS = 8
WARM = 10
"""Generations after which memory should not grow any more."""


def measure(ranks: int, generations: int, checkpoints: int) -> dict[str, float]:
    """Return what a commit of so many ranks takes, and a choice among so many checkpoints.

    In a process of its own, as a controller is: it is asked for its memory.
    """
    counts = [str(count) for count in (ranks, generations, checkpoints)]
    command = [sys.executable, "-m", "tests.bench.saving.fleet", *counts]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    found: dict[str, float] = json.loads(told)
    return found


class Fleet:
    """The agents of so many ranks, a vault, and a store whose shards take no memory here."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._store = Elsewhere(ranks)
        self._told: queue.Queue[Event] = queue.Queue()
        job = steps_job(checkpoint__scrubMibPerSecond=0)
        run = msgspec.convert(job, TrainingRun)
        # What is deleted late would pile up beside the next checkpoints.
        limits = msgspec.structs.replace(derive(2.0, 60.0), save_s=SETTLED_S)
        self._vault = Vault(run, "/nowhere", _no_time, limits=limits, store=self._store)
        self._vault.begin(EPOCH)
        self._agents = [
            _agent(node, range(node * RANKS_PER_NODE, min((node + 1) * RANKS_PER_NODE, ranks)))
            for node in range(-(-ranks // RANKS_PER_NODE))
        ]

    def commit(self, step: int) -> tuple[float, int]:
        """Commit a checkpoint that is written; return the seconds, and the record's bytes.

        The time begins when the first agent has its last receipt.
        """
        written = self._write(step)
        begun = time.perf_counter()
        messages = []
        for rank in range(self._ranks):
            agent = self._agents[rank // RANKS_PER_NODE]
            fact = agent.written(Rank(rank), Step(step), written[rank], MODEL)
            if fact is not None:
                messages.append(msgspec.json.encode(fact))
        facts = [msgspec.json.decode(message, type=ShardsWritten) for message in messages]
        order = CommitCheckpoint(
            generation=EPOCH,
            reason="a benchmark",
            step=Step(step),
            receipts=tuple(one for fact in facts for one in fact.receipts),
            model=MODEL,
        )
        self._vault.commit(order, self._told.put)
        answer = self._told.get()
        seconds = time.perf_counter() - begun
        assert isinstance(answer, CheckpointCommitted), answer
        # Older checkpoints are deleted beside the next steps.
        assert self._vault.settle(SETTLED_S)
        return seconds, self._store.size(commit_key(step, EPOCH))

    def _write(self, step: int) -> list[Written]:
        made = []
        for shard in range(self._ranks):
            self._store.put(body_key(step, EPOCH, shard), b"")
            self._store.put(index_key(step, EPOCH, shard), b"")
            digest = sha256_hex(f"{step} {shard}".encode())
            # Of the length that a real one has: it is in the message as well.
            seen = Impression(
                shard=shard,
                boxes="0" * 16,
                content=f"{shard:032x}",
                moving=f"{shard:032x}",
                extra=f"{step:016x}",
                rms=0.02,
            )
            made.append(Written(Receipt(shard, BODY_BYTES + shard, digest), seen))
        return made


def main() -> None:
    """Measure, and print what was found as JSON."""
    ranks, generations, checkpoints = map(int, sys.argv[1:])
    heap.share_one()
    print(json.dumps(measure_commits(ranks, generations) | measure_listing(checkpoints)))


def measure_commits(ranks: int, generations: int) -> dict[str, float]:
    """Return seconds and bytes of a commit, and how memory grew from the tenth to the last.

    What Python's own allocator has handed out is counted as well: what grows without that is
    memory that was freed, and is kept because something else lies beside it. That comes to an end:
    so growth is told from half of the generations on as well, and that of the most that there ever
    was, within a commit.
    """
    fleet = Fleet(ranks)
    taken, before, blocks_before, most_before, half = [], 0, 0, 0, 0
    for step in range(1, generations + 1):
        seconds, size = fleet.commit(step)
        taken.append(seconds)
        if step == min(WARM, generations):
            before, blocks_before = _resident(), sys.getallocatedblocks()
            most_before = _most()
        if step == -(-generations // 2):
            half = _resident()
    after = _resident()
    taken.sort()
    return {
        "commit_s": taken[len(taken) // 2],
        "commit_longest_s": taken[-1],
        "commit_record_mb": size / 1e6,
        "commit_memory_mb": after / 1e6,
        "commit_memory_growth": after / before - 1,
        "commit_memory_growth_of_second_half": after / half - 1,
        "commit_memory_growth_of_the_most": _most() / most_before - 1,
        "commit_blocks_growth": sys.getallocatedblocks() / blocks_before - 1,
    }


def measure_listing(count: int) -> dict[str, float]:
    """Return the seconds to list and to choose among `count` checkpoints, 20 ms an operation."""
    store = MemoryStore()
    for step in range(1, count + 1):
        receipts = []
        for shard in range(LISTED_SHARDS):
            for key in (body_key(step, EPOCH, shard), index_key(step, EPOCH, shard)):
                store.put(key, b"")
            receipts.append(ShardReceipt(shard=shard, size=0, index_digest=sha256_hex(b"")))
        manifest = make_manifest(receipts, run_id="run", model=MODEL, step=step, epoch=EPOCH)
        store.put(commit_key(step, EPOCH), encode_manifest(manifest))
    far = Catalog(FaultyStore(store, slow_s=LATENCY_S))
    begun = time.perf_counter()
    assert sum(record.manifest is not None for record in far.commits()) == count
    listed = time.perf_counter()
    chosen, _ = far.newest_trusted(at_least=Trust.WRITTEN)
    assert chosen is not None
    assert chosen.step == count
    return {"list_s": listed - begun, "choose_s": time.perf_counter() - listed}


def _agent(number: int, ranks: range) -> Owed:
    node, mine = NodeId(f"node-{number:05d}"), tuple(map(Rank, ranks))
    agent = Owed()
    agent.begin(
        Begin(
            order="begin",
            generation=EPOCH,
            world_size=len(ranks),
            ranks=mine,
            seats=(node,) * len(ranks),
            shard_of=mine,
            writers=mine,
        ),
        node,
    )
    return agent


def _no_time() -> Seconds:
    return Seconds(0.0)


def _resident() -> int:
    """Return the bytes of this process that are in memory now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _most() -> int:
    """Return the most bytes of this process that ever were in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
