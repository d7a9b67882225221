"""Any sequence of orders, deaths and lost connections leaves an agent with what it should have."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from orchestrator.protocol.ids import Generation
from orchestrator.protocol.messages import Fence, Joined
from tests.programs.played import Agent, Controller, alive, wait_for

pytestmark = pytest.mark.process
ROUNDS = 20
RANKS = 3
SEATS = ["node-0"] * RANKS
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGSTOP)


def descriptors(agent: Agent) -> int:
    return len(list(Path(f"/proc/{agent.pid}/fd").iterdir()))


def some_children(agent: Agent) -> list[int]:
    """Return its children at a moment at which there are some."""
    found: list[int] = []

    def seen() -> bool:
        found[:] = agent.children()
        return bool(found)

    wait_for(seen)
    return found


def disturb(controller: Controller, agent: Agent, chance: np.random.Generator) -> None:
    """Do something that an agent has to live with."""
    match int(chance.integers(0, 8)):
        case 0 | 1 | 2:
            # The warm process is among them, and so is whoever stands by.
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(chance.choice(some_children(agent))), int(chance.choice(SIGNALS)))
        case 3:
            controller.stop()
            controller.start()
        case 4:
            controller.send_raw("node-0", "rubbish")
            time.sleep(0.05)
        case _:
            pass
    wait_for(lambda: "node-0" in controller.links)


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_happens_every_seat_has_one_process_and_one_stands_by(
    controller: Controller, start: Callable[..., Agent], seed: int
) -> None:
    chance = np.random.default_rng(seed)
    agent = start(ranks=RANKS)
    controller.job.update(step_s=0.002, save_every=10, durable_every=30)
    controller.hear(Joined)
    controller.begin(1, SEATS)
    controller.reached("stepped", 1)
    wait_for(lambda: agent.parked() == 1)
    before = descriptors(agent)

    for generation in range(2, 2 * ROUNDS, 2):
        disturb(controller, agent, chance)
        with contextlib.suppress(ConnectionClosed, KeyError):
            if chance.random() < 0.2:
                controller.send("node-0", Fence(order="f", generation=Generation(generation)))
            dismiss = tuple(rank for rank in range(RANKS) if chance.random() < 0.3)
            controller.begin(generation + 1, SEATS, dismiss=dismiss)
        time.sleep(float(chance.choice([0.0, 0.005, 0.1])))
    wait_for(lambda: "node-0" in controller.links)
    controller.begin(2 * ROUNDS, SEATS)
    controller.reached("stepped", 2 * ROUNDS)

    wait_for(lambda: agent.parked() == 1)
    # Ranks, one that stands by, the warm process; what died is reaped.
    wait_for(lambda: len(agent.children()) == RANKS + 2)
    assert all(map(alive, agent.children()))
    assert len(list((agent.memory / "beacons").iterdir())) == RANKS + 1
    assert descriptors(agent) <= before + 4
    assert "Traceback" not in agent.log.read_text()
    assert agent.terminate() == 0
    assert not agent.memory.exists()
