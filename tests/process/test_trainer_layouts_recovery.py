"""Ranks in three dimensions lose each other, and end with the bits of those that did not."""

import os
import signal
import time
from typing import Any

import pytest

from orchestrator.agent.warm import Warm
from tests.programs.seated import Result, a_world, left_alone

pytestmark = pytest.mark.process
SIZES = {"dim": 32, "layers": 2, "heads": 8, "kvHeads": 4, "ffnDim": 48, "vocab": 1280}
JOB: dict[str, Any] = {
    "trainer": {
        "model": SIZES,
        "steps": 9,
        "seqLen": 16,
        "globalBatch": 4,
        "microBatch": 1,
    },
    "parallelism": {"pp": 2, "dpReplicate": 1, "dpShard": 1, "cp": 2, "tp": 2},
    "checkpoint": {"everySteps": 10, "memoryEverySteps": 1},
}


@pytest.fixture(scope="module")
def expected(warm: Warm) -> Result:
    """What the run comes to that is left alone."""
    return left_alone(warm, JOB)


def test_ranks_that_die_freeze_and_change_seats_change_no_bit(warm: Warm, expected: Result) -> None:
    with a_world(warm, parked=10, job=JOB) as world:
        world.until(lambda: world.step() >= 2)
        world.kill(5)
        world.begin()

        world.until(lambda: world.step() >= 4)
        os.kill(world.ranks[2].process.pid, signal.SIGSTOP)
        world.until(world.still)
        told = time.monotonic()
        world.kill(2)
        world.begin()
        left_s = time.monotonic() - told

        world.until(lambda: world.step() >= 6)
        world.ranks = {rank: world.ranks[(rank + 3) % world.size] for rank in world.ranks}
        world.begin()
        world.until(world.finished)

        assert world.result() == expected
        assert [step for step, _ in expected[1]] == list(range(1, 10))
        assert min(world.restored_from[8:]) >= 1
        assert left_s < 2.0
