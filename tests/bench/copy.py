"""What a copy of a shard costs in processor time, on the node that gives it and where it goes.

    python -m tests.bench.copy [--mb 100] [--rounds 8] [--json]

Two keepers, each in a process of its own, pass a shard through the loopback interface: the one here
has the other hold a copy, then fetches one from it. Beside that, as the floor of this machine: the
same bytes go from file to file in memory and are verified, by nobody for nobody. All are medians of
processor time (user and system), in ms per 100 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from orchestrator.agent.keeper import Keeper
from orchestrator.agent.transfer import allocate, verify_file
from orchestrator.protocol.ids import Generation, Rank, Step
from tests.bench import ending
from tests.runs import REPOSITORY
from tests.shards import GENERATION, RANK, STEP, THERE, TOKEN, stage

THEIRS = Rank(1)


def main() -> None:
    """Measure and print; or be the other node, if told so."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mb", type=int, default=100)
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--json", action="store_true")
    options.add_argument("--other", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.other is not None:
        asyncio.run(be_the_other(chosen.other, chosen.mb))
        return
    with ending.new_folder(Path("/dev/shm")) as root:  # noqa: S108 - where shards are
        found = asyncio.run(measure(Path(root), chosen.mb, chosen.rounds))
    if chosen.json:
        print(json.dumps(found))
        return
    print("processor time, ms per 100 MB")
    for name, value in found.items():
        print(f"  {name:<24}{value:8.1f}")


async def measure(root: Path, mb: int, rounds: int) -> dict[str, float]:
    """Return the median cost at each end of each way, of the floor, and their ratio."""
    memory = root / "here"
    memory.mkdir()
    keeper = Keeper(memory, token=TOKEN)
    await keeper.open()
    costs: dict[str, list[float]] = {}
    try:
        with other(root / "there", mb) as (address, their_ms):
            peers = {THERE: address}
            keeper.begin(GENERATION, peers, None)
            message = stage(memory, RANK, STEP, GENERATION, size=mb * 1_000_000)
            keeper.staged(RANK, message)

            async def cost(give: str, take: str, call: Callable[[], Awaitable[object]]) -> None:
                before = own_ms(), their_ms()
                await call()
                after = own_ms(), their_ms()
                for name, end in ((give, 0), (take, 1)):
                    costs.setdefault(name, []).append((after[end] - before[end]) * 100 / mb)

            # The first copy pays for the connection.
            await keeper.copy_to(THERE, RANK, STEP)
            for _ in range(rounds):
                copy = copy_to_a_file(memory, message.index)
                costs.setdefault("floor", []).append(copy * 100 / mb)
                await cost("copy, giver", "copy, taker", lambda: keeper.copy_to(THERE, RANK, STEP))
            for generation in range(GENERATION + 1, GENERATION + 1 + 2 * rounds, 2):
                # A restart from before the step, then one from it: so it is to be fetched again.
                keeper.begin(Generation(generation), peers, Step(STEP - 1))
                keeper.begin(Generation(generation + 1), peers, STEP)
                await cost(
                    "fetch, taker", "fetch, giver", lambda: keeper.prepare(THEIRS, STEP, THERE)
                )
    finally:
        await keeper.close()
    middle = {name: statistics.median(values) for name, values in costs.items()}
    both = middle["copy, giver"] + middle["copy, taker"]
    return middle | {"copy, both / floor": both / middle["floor"]}


def copy_to_a_file(memory: Path, index: str) -> float:
    """Copy the staged shard into a new file and verify it; return what that cost, in ms."""
    source, target = memory / "rank-00000.slot-0", memory / "floor"
    begun = own_ms()
    size = source.stat().st_size
    descriptor = allocate(target, size)
    with source.open("rb", buffering=0) as file:
        while rest := size - file.tell():
            os.sendfile(descriptor, file.fileno(), None, rest)
    os.close(descriptor)
    verify_file(target, index)
    target.unlink()
    return own_ms() - begun


def own_ms() -> float:
    """Return the processor time of this process so far, all its threads together."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return (used.ru_utime + used.ru_stime) * 1e3


@contextlib.contextmanager
def other(memory: Path, mb: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """Run the other node; yield its address, and what returns its processor time in ms."""
    memory.mkdir()
    command = [sys.executable, "-m", "tests.bench.copy", "--other", str(memory), "--mb", str(mb)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def their_ms() -> float:
            asked.write("\n")
            asked.flush()
            return float(answers.readline())

        try:
            yield answers.readline().strip(), their_ms
        finally:
            process.terminate()


async def be_the_other(memory: Path, mb: int) -> None:
    """Keep shards until standard input ends; say for each line how much time that took so far."""
    keeper = Keeper(memory, token=TOKEN)
    address = await keeper.open()
    keeper.begin(GENERATION, {}, None)
    keeper.staged(THEIRS, stage(memory, THEIRS, STEP, GENERATION, size=mb * 1_000_000))
    print(address, flush=True)
    ended = asyncio.Event()

    def answer() -> None:
        if sys.stdin.readline():
            print(own_ms(), flush=True)
        else:
            ended.set()

    asyncio.get_running_loop().add_reader(sys.stdin, answer)
    await ended.wait()
    await keeper.close()


if __name__ == "__main__":
    main()
