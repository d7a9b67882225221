"""Live ranks of a model cut in several dimensions count what they wait in, group by group."""

from typing import Any

import numpy as np
import pytest

from orchestrator.agent.warm import Warm
from orchestrator.detect import awaited
from orchestrator.detect.waiting import culprits_among, gathered, strangers
from orchestrator.protocol.ids import Rank
from orchestrator.protocol.messages import GroupCounts
from orchestrator.protocol.rank import Misbehave
from tests.programs.seated import World, a_world

pytestmark = pytest.mark.process
SIZES = {"dim": 32, "layers": 2, "heads": 8, "kvHeads": 4, "ffnDim": 48, "vocab": 1280}
TRAINER = {"model": SIZES, "steps": 10_000, "seqLen": 16, "globalBatch": 4, "microBatch": 1}


def told(world: World) -> list[GroupCounts]:
    return [
        GroupCounts(group, (Rank(rank),), (entered,), (left,), (what,))
        for rank, member in world.ranks.items()
        for group, entered, left, what in member.beacon.groups(member.beacon.read().generation)
    ]


def named(world: World) -> tuple[list[int], list[int]]:
    """Return who is at fault by the counts, and who waits."""
    counts, _ = gathered(told(world), world.size)
    waits = sorted(set(counts.rank[counts.waits].tolist()))
    return culprits_among(counts, world.size).tolist(), waits


def job_of(cut: dict[str, int]) -> dict[str, Any]:
    """Return a job that saves nothing, so that ranks meet in nothing but its steps."""
    return {
        "trainer": TRAINER,
        "parallelism": cut,
        "checkpoint": {"everySteps": 10_000, "memoryEverySteps": 10_000},
    }


@pytest.mark.parametrize(
    ("cut", "stuck", "groups"),
    [
        (
            {"dpReplicate": 1, "dpShard": 2, "tp": 2},
            2,
            {0: {"all", "shard@0", "tp@0"}, 3: {"all", "shard@1", "tp@2"}},
        ),
        (
            {"dpReplicate": 1, "dpShard": 1, "pp": 2, "tp": 2},
            1,
            {2: {"all", "pp@0", "pp 0>2", "pp 2>0", "tp@2"}},
        ),
        (
            {"dpReplicate": 2, "dpShard": 1, "cp": 2},
            3,
            {1: {"all", "replicate@1", "shard@0", "cp@0"}},
        ),
    ],
)
def test_a_rank_that_never_enters_the_next_collective_is_who_the_counts_name(
    warm: Warm, cut: dict[str, int], stuck: int, groups: dict[int, set[str]]
) -> None:
    others = [rank for rank in range(4) if rank != stuck]
    with a_world(warm, parked=4, job=job_of(cut)) as world:
        world.until(lambda: world.step() >= 2)
        world.ranks[stuck].send(Misbehave(how="block"))
        # On a busy machine a rank may stand still on its way to a collective as well.
        world.until(lambda: world.still() and named(world) == ([stuck], others))
        counts, names = gathered(told(world), world.size)

        for rank, expected in groups.items():
            assert {names[group] for group in counts.group[counts.rank == rank]} == expected


@pytest.mark.parametrize(
    ("cut", "how"),
    [
        ({"dpReplicate": 4, "dpShard": 1}, "mismatch-collective"),
        ({"dpReplicate": 2, "dpShard": 2}, "skip-collective"),
    ],
    ids=["another one than all others", "none, and the next one in another group"],
)
def test_a_rank_that_goes_on_with_another_collective_is_who_they_name_though_all_wait(
    warm: Warm, cut: dict[str, int], how: str
) -> None:
    strays = 1
    with a_world(warm, parked=4, job=job_of(cut)) as world:
        world.until(lambda: world.step() >= 2)
        world.ranks[strays].send(Misbehave(how=how, options={"at": "sum of gradients"}))
        world.until(lambda: world.still() and named(world)[1] == [0, 1, 2, 3])
        counts, names = gathered(told(world), world.size)

    assert culprits_among(counts, 4).tolist() == []
    left_out = awaited.left_out(*awaited.by_kind(counts, names, 4), np.zeros(4, np.int64)).tolist()
    assert (strangers(counts).tolist() or left_out) == [strays]
