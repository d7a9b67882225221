"""Calls to agents in other processes, which are frozen or killed in the middle of a shard."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.agent.shards import UnreachableError
from orchestrator.protocol.ids import Rank
from tests.shards import RANK, STEP, THERE, TOKEN, calling, settled

pytestmark = pytest.mark.process
THEIRS = Rank(1)

PEER = """
import asyncio, sys
from pathlib import Path
from orchestrator.agent.keeper import Keeper
from tests.shards import stage

async def main():
    keeper = Keeper(Path(sys.argv[1]), token=sys.argv[2])
    print(await keeper.open(), flush=True)
    keeper.begin(2, {}, None)
    keeper.staged(1, stage(Path(sys.argv[1]), 1, 7, 2, size=40_000_000))
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A keeper in a process of its own: the process, and its address."""
    memory = tmp_path / "peer"
    memory.mkdir()
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", PEER, str(memory), TOKEN],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert process.stdout.readline() == "ready\n"
        yield process, address
        process.kill()


def test_a_frozen_peer_costs_no_more_than_the_time_that_was_given(
    tmp_path: Path, peer: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = peer

    async def scenario() -> None:
        async with calling(tmp_path, address, 40_000_000) as node:
            process.send_signal(signal.SIGSTOP)
            begun = time.monotonic()
            with pytest.raises(UnreachableError, match=r"after 0.3 s"):
                await node.keeper.copy_to(THERE, RANK, STEP, timeout_s=0.3)
            with pytest.raises(UnreachableError, match=r"fetching it from node-1 after 0.3 s"):
                await node.keeper.prepare(THEIRS, STEP, THERE, timeout_s=0.3)
            assert time.monotonic() - begun < 10
            assert node.files() == ["rank-00000.slot-0"]

            process.send_signal(signal.SIGCONT)
            await node.keeper.copy_to(THERE, RANK, STEP)
            assert (await node.keeper.prepare(THEIRS, STEP, THERE))[1] == "fetched"
            node.keeper.begin(3, {}, 6)
            await settled(lambda: len(node.files()) == 1)
            node.stage(0, 7, 3)

    asyncio.run(scenario())


def test_a_peer_that_is_killed_while_it_sends_leaves_nothing_half_here(
    tmp_path: Path, peer: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = peer

    async def scenario() -> None:
        async with calling(tmp_path, address) as node:
            preparing = asyncio.create_task(node.keeper.prepare(THEIRS, STEP, THERE, timeout_s=5))
            await settled(lambda: len(node.files()) == 2, pause_s=0)
            process.kill()

            with pytest.raises(UnreachableError):
                await preparing
            assert len(node.keeper.holdings()) == 1

    asyncio.run(scenario())


def test_a_peer_that_is_killed_while_it_takes_is_given_up_and_its_shard_let_go(
    tmp_path: Path, peer: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = peer
    memory = tmp_path / "peer"

    async def scenario() -> None:
        async with calling(tmp_path, address, 100_000_000) as node:
            copying = asyncio.create_task(node.keeper.copy_to(THERE, RANK, STEP, timeout_s=5))
            await settled(lambda: any(memory.glob("copy-*")), pause_s=0)
            process.kill()

            with pytest.raises(UnreachableError):
                await copying
            assert node.freed == []

    asyncio.run(scenario())
