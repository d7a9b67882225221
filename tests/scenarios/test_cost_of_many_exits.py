"""What one more exit costs the controller does not grow with those that it knows already.

Work is counted in bytecode instructions, which a busy machine does not change.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from orchestrator.core.events import CheckpointFound, ControllerStarted, Reported, Tick
from orchestrator.core.phases import RunPhase
from orchestrator.protocol.ids import Generation, NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import Holding, RankExited, ShardsHeld
from tests import runfiles
from tests.conftest import Cluster

FEW, MANY = 64, 512
LARGE = runfiles.text(
    "large",
    nodes={"count": MANY // 8, "ranksPerNode": 8},
    parallelism={},
    trainer={"steps": 1000},
)
TRACEBACK = '  File "a.py", line 1, in f'


def instructions(call: Callable[[], object]) -> int:
    """Return how many bytecode instructions a call takes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        del argument
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def large(*, held: bool) -> Cluster:
    """64 nodes of 8 ranks in generation 1; with every shard in memory, or none."""
    cluster = Cluster(LARGE)
    handle = cluster.controller.handle
    handle(ControllerStarted(at=Seconds(0.0), incarnation=1))
    for index in range(MANY // 8):
        cluster.join(f"node-{index:02d}")
    handle(CheckpointFound(at=Seconds(0.0), step=None, epoch=None, key=""))
    for node in cluster.state.world if held else ():
        ranks = cluster.state.ranks_of(node)
        holdings = tuple(Holding(rank, Step(0)) for rank in ranks)
        cluster.say(node, ShardsHeld(generation=Generation(1), holdings=holdings))
    return cluster


def costs(cluster: Cluster, seats: tuple[NodeId, ...], generation: int) -> dict[int, int]:
    """Let every rank raise the same; return what an exit and a tick cost after so many."""
    cost = {}
    for rank, node in enumerate(seats):
        cluster.after(0.001)
        fact = RankExited(
            generation=Generation(generation), rank=Rank(rank), pid=rank + 1, code=1, phase=6,
            step=Step(0), kind="ValueError", message="x", traceback=TRACEBACK,
        )  # fmt: skip
        exited = Reported(at=cluster.at(), node=node, fact=fact)
        tick = Tick(at=cluster.at())
        if rank + 1 not in (FEW, MANY):
            cluster.controller.handle(exited)
            continue

        def both(exited: Reported = exited, tick: Tick = tick) -> None:
            cluster.controller.handle(exited)
            cluster.controller.handle(tick)

        cost[rank + 1] = instructions(both)
    return cost


@pytest.mark.parametrize("held", [True, False], ids=["told late", "while searching"])
def test_an_exit_costs_the_same_after_512_as_after_64(*, held: bool) -> None:
    cluster = large(held=held)

    cost = costs(cluster, cluster.state.seats, generation=1)

    assert cluster.state.generation == (2 if held else 1)
    assert cluster.state.incidents[0].ranks == tuple(range(MANY))
    assert cost[MANY] < 1.5 * cost[FEW]


def test_a_fault_that_came_back_costs_the_same_after_512_exits_as_after_64() -> None:
    cluster = large(held=False)
    seats = cluster.state.seats
    costs(cluster, seats[:1], generation=1)
    cluster.tell(CheckpointFound(at=cluster.at(), step=None, epoch=None, key=""))
    assert cluster.state.generation == 2
    # All of them on one node: on two, it would be the job's fault, and the run over.
    cost = {}
    for count in (FEW, MANY):
        while len(cluster.state.exits) < count:
            fact = RankExited(
                generation=Generation(2), rank=Rank(0), pid=10 + len(cluster.state.exits), code=1,
                phase=6, step=Step(0), kind="ValueError", message="x", traceback=TRACEBACK,
            )  # fmt: skip
            cluster.controller.handle(Reported(at=cluster.at(), node=seats[0], fact=fact))
        cost[count] = instructions(lambda: cluster.controller.handle(Tick(at=cluster.at())))

    assert cluster.state.phase is RunPhase.BACKING_OFF
    assert cost[MANY] < 1.5 * cost[FEW]
