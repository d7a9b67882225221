"""A real agent with real ranks; the test is its controller."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.protocol.messages import (
    Beat,
    Joined,
    Prepared,
    RankExited,
    RanksFinished,
    ShardsHeld,
)
from tests.programs.played import Agent, Controller, holder, remove, shared_folder, wait_for

pytestmark = pytest.mark.process
Start = Callable[..., Agent]


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    controller = Controller(tmp_path)
    controller.start()
    yield controller
    controller.stop()


@pytest.fixture
def start(controller: Controller, tmp_path: Path) -> Iterator[Start]:
    memory = shared_folder()
    agents: list[Agent] = []

    def make(node: str = "node-0", **more: object) -> Agent:
        agents.append(Agent(tmp_path, memory, node, **more))
        return agents[-1]

    yield make
    try:
        for agent in agents:
            agent.close()
    finally:
        remove(memory)


def train(controller: Controller, agent: Agent, **job: object) -> None:
    """Have a world of one node and two ranks run up to its first step."""
    controller.job.update(job)
    controller.hear(Joined)
    controller.begin(1, ["node-0", "node-0"])
    controller.reached("stepped", 1)


def test_ranks_are_seated_train_and_report_every_step(controller: Controller, start: Start) -> None:
    agent = start()
    train(controller, agent, steps=60)

    _, finished = controller.hear(RanksFinished)

    assert finished.ranks == (0, 1)
    assert finished.lanes == ((60, 0), (60, 1))
    assert [report.step for report in controller.reports()] == list(range(1, 61))
    _, beat = controller.hear(Beat, where=lambda beat: len(beat.ranks) == 2)
    assert (beat.generation, beat.ranks) == (1, (0, 1))
    assert set(beat.states) <= set("RSD")


def test_a_killed_rank_is_told_within_milliseconds_and_one_that_stands_by_takes_its_seat(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller, agent, save_every=10)
    wait_for(lambda: agent.parked() == 1)
    controller.hear(ShardsHeld, where=lambda fact: holder(fact, 1, 20))
    controller.hear(ShardsHeld, where=lambda fact: holder(fact, 0, 20))
    victim, other = agent.rank_pid(1, 1), agent.rank_pid(0, 1)

    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    told, fact = controller.hear(RankExited)
    ordered = controller.begin(
        2, ["node-0", "node-0"], dismiss=(1,), restore=20, sources=("node-0", "node-0")
    )
    seated = controller.reached("seated", 2)

    print(f"exit told after {(told - killed) * 1e3:.1f} ms")
    print(f"seats given after {(seated - ordered) * 1e3:.1f} ms")
    assert (fact.rank, fact.code, fact.pid) == (1, -signal.SIGKILL, victim)
    assert fact.step >= 20
    assert told - killed < 0.5
    assert controller.hear(Prepared)[1].own == 2
    controller.reached("stepped", 2)
    assert agent.rank_pid(0, 2) == other
    assert agent.rank_pid(1, 2) != victim
    assert controller.reports()[-1].step > 20
    assert len(controller.messages(RankExited)) == 1
