"""A rank that loses its peers again and again has no more threads, descriptors or memory for it."""

from pathlib import Path
from typing import NamedTuple

import pytest

from orchestrator.agent.warm import Warm
from tests.programs.seated import SIZES, a_world

pytestmark = pytest.mark.process

RESTARTS = 50
JOB = {
    "trainer": {"model": SIZES, "steps": 100_000, "seqLen": 32, "globalBatch": 4},
    "parallelism": {"dpReplicate": 2, "dpShard": 1},
    "checkpoint": {"everySteps": 1000, "memoryEverySteps": 2},
}


class Look(NamedTuple):
    threads: int
    descriptors: int
    resident_mb: float


def look(pid: int) -> Look:
    proc = Path(f"/proc/{pid}")
    (resident,) = [
        line.split()[1]
        for line in (proc / "status").read_text().splitlines()
        if line.startswith("VmRSS")
    ]
    threads, descriptors = (len(list((proc / name).iterdir())) for name in ("task", "fd"))
    return Look(threads, descriptors, int(resident) / 1024)


def test_fifty_restarts_leave_nothing_behind_in_a_process_that_survives_them(warm: Warm) -> None:
    """Kept for ever, a world that was left would be 9 threads, 12 descriptors and 2 MB."""
    looks: dict[int, list[Look]] = {}
    with a_world(warm, parked=2, job=JOB) as world:
        for _ in range(RESTARTS):
            world.until(lambda: world.reached("stepped"))
            survivor = world.ranks[0].process.pid
            looks.setdefault(survivor, []).append(look(survivor))
            world.kill(1)
            world.begin()

    # A process that does not get out of a world in time ends itself; few do.
    assert len(looks) <= 5
    longest = max(looks.values(), key=len)
    assert len(longest) >= 10
    settled, last = longest[4], longest[-1]
    # One world may just be on its way out, or wait for a timeout.
    assert last.threads <= settled.threads + 10
    assert last.descriptors <= settled.descriptors + 25
    assert last.resident_mb <= settled.resident_mb + 5 + 0.5 * len(longest)
