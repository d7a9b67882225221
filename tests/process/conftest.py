"""Real agents, and the controller that a test plays; a real rank, and its agent that one plays."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.agent import linux
from orchestrator.agent.warm import Warm
from tests.programs import supervised
from tests.programs.played import Agent, Controller, remove, shared_folder


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    controller = Controller(tmp_path)
    controller.start()
    yield controller
    controller.stop()


@pytest.fixture
def start(controller: Controller) -> Iterator[Callable[..., Agent]]:
    """Start agents that call the controller; they and their memory are gone afterwards."""
    memory = shared_folder()
    agents: list[Agent] = []

    def make(node: str = "node-0", **more: object) -> Agent:
        agents.append(Agent(controller.folder, memory, node, **more))
        return agents[-1]

    yield make
    try:
        for agent in agents:
            agent.close()
    finally:
        remove(memory)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[supervised.Agent]:
    agent = supervised.Agent(tmp_path)
    yield agent
    agent.close()


@pytest.fixture(scope="module")
def warm(request: pytest.FixtureRequest) -> Iterator[Warm]:
    """Have the trainer imported; what it begins with is ENTRYPOINT, if a module names one."""
    linux.adopt_orphans()
    with tempfile.TemporaryFile() as log:
        warm = Warm(getattr(request.module, "ENTRYPOINT", "trainer.train:main"), log)
        warm.wait_ready()
        yield warm
    warm.close()
    linux.adopt_orphans(on=False)
