"""A real agent that is told to end while its processes are still being made."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from orchestrator.agent import linux
from tests.programs.played import Agent, wait_for

pytestmark = pytest.mark.process
Start = Callable[..., Agent]
WARMING_S = 0.8
"""From its first moment to processes that stand by, if the machine is not busy."""

NEWS = (" INFO ", "rehearsed by", "prepared ")


@pytest.fixture
def heir() -> Iterator[None]:
    """Have what an agent leaves behind come to this process, where it is seen."""
    linux.adopt_orphans()
    yield
    linux.adopt_orphans(on=False)


def complaints(agent: Agent) -> list[str]:
    """Return every line that the agent and its processes have printed, but for plain news."""
    texts = [
        path.read_text() if path.exists() else ""
        for path in (agent.log, agent.work / "warm.log", agent.work / "parked.log")
    ]
    lines = "".join(texts).splitlines()
    return [line for line in lines if not any(word in line for word in NEWS)]


@pytest.mark.usefixtures("controller", "heir")
@pytest.mark.parametrize("seed", range(8))
def test_an_agent_that_is_stopped_while_it_warms_up_leaves_no_process_and_no_complaint(
    start: Start, seed: int
) -> None:
    before = linux.children()
    agent = start(ranks=3)
    wait_for((agent.work / "warm.log").exists)
    time.sleep(np.random.default_rng(seed).uniform(0, WARMING_S))

    assert agent.terminate() == 0

    assert linux.children() == before
    assert complaints(agent) == []
    assert not agent.memory.exists()
