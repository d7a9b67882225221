"""Real connections to a real server: who gets in, what they hear, what they can not break."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from orchestrator import compose
from orchestrator.core.events import ControllerStarted, Event, FaultInjected
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.agent import AGENT_PATH
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.messages import (
    MESSAGE_MAX_BYTES,
    PROTOCOL_VERSION,
    Arm,
    Begin,
    CarryOut,
    FaultCarriedOut,
    FaultDue,
    FromAgent,
    Joined,
    ToAgent,
    Welcome,
    encode,
    read_to_agent,
)
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server.app import Server
from orchestrator.server.listening import PortInUseError
from orchestrator.worlds.agents import AgentWorld
from orchestrator.worlds.clock import RunClock
from orchestrator.worlds.faults import Schedule
from orchestrator.worlds.vault import Vault
from tests import runfiles
from tests.programs.played import wait_for

pytestmark = pytest.mark.process
TOKEN = "a-token-for-tests"  # noqa: S105 - it opens nothing but this test
WAIT_S = 10.0
RUN = runfiles.text(
    "channel",
    nodes={"count": 2},
    parallelism={"dpReplicate": 2},
    trainer={"steps": 10},
    detection={"detectWithin": "1s"},
)
PLAN = """
kind: FaultPlan
faults: [{when: {step: 3}, fault: kill-rank, rank: 1}]
"""


class Side:
    """The controller's side: server, world and controller, on threads."""

    def __init__(self, folder: Path) -> None:
        run = compose.parse(RUN, TrainingRun, "run.yaml")
        self.controller = compose.controller(run)
        self.events: list[Event] = []
        self.clock = RunClock(folder / "clock", reached=self.controller.state.now)
        limits = self.controller.state.timeouts
        self.vault = Vault(run, str(folder / "store"), self.clock, limits=limits)
        self.world = AgentWorld(
            run,
            limits,
            clock=self.clock,
            vault=self.vault,
            schedule=Schedule(compose.parse(PLAN, FaultPlan, "plan.yaml").drawn()),
        )
        self.server = Server(self.world, TOKEN)
        self.thread = threading.Thread(target=self._drive)

    def _drive(self) -> None:
        self._handle(ControllerStarted(at=self.clock(), incarnation=1))
        for event in self.world.events():
            self._handle(event)
        self.left = self.world.see_off(0.5)

    def _handle(self, event: Event) -> None:
        self.events.append(event)
        for decision in self.controller.handle(event):
            self.world.carry_out(decision)

    def close(self) -> None:
        self.world.stop("the test")
        self.thread.join(WAIT_S)
        self.server.stop()
        self.vault.settle(10)
        assert not self.thread.is_alive()


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    side = Side(tmp_path)
    side.server.start()
    side.thread.start()
    yield side
    side.close()


def dial(side: Side, token: str = TOKEN) -> ClientConnection:
    return connect(
        side.server.url.replace("http", "ws") + AGENT_PATH,
        additional_headers={"Authorization": f"Bearer {token}"},
        open_timeout=WAIT_S,
    )


def say(connection: ClientConnection, message: FromAgent) -> None:
    connection.send(encode(message).decode())


def hear(connection: ClientConnection, kind: type) -> ToAgent:
    while True:
        message = read_to_agent(connection.recv(WAIT_S))
        if isinstance(message, kind):
            return message


def expect_close(connection: ClientConnection) -> None:
    """Fail (TimeoutError) unless the other side closes, whatever it says before."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            connection.recv(WAIT_S)


def joined(node: str, **changes: object) -> Joined:
    fields: dict[str, object] = {
        "node": node,
        "version": PROTOCOL_VERSION,
        "incarnation": 1,
        "pid": 1,
        "peer_address": f"{node}:1",
        "generation": 0,
        "mark": 0,
    }
    return msgspec.convert(fields | changes, Joined)


def test_an_agent_without_the_token_is_turned_away(side: Side) -> None:
    with pytest.raises(InvalidStatus, match="401"):
        dial(side, "a-guess")


def test_nodes_that_join_are_welcomed_and_given_seats_in_generation_one(side: Side) -> None:
    with dial(side) as one, dial(side) as two:
        say(one, joined("node-0"))
        say(two, joined("node-1"))

        welcome, begin = hear(one, Welcome), hear(two, Begin)

    assert isinstance(welcome, Welcome)
    assert isinstance(begin, Begin)
    assert welcome.job["trainer"]["steps"] == 10
    assert begin.generation == 1
    assert (begin.world_size, begin.seats) == (2, ("node-1",))
    assert begin.peers == {"node-0": "node-0:1"}


def test_a_node_that_comes_back_is_told_again_where_it_belongs(side: Side) -> None:
    with dial(side) as one:
        say(one, joined("node-0"))
        with dial(side) as two:
            say(two, joined("node-1"))
            first = hear(two, Begin)
        with dial(side) as two:
            say(two, joined("node-1"))
            second = hear(two, Begin)

    assert isinstance(first, Begin)
    assert isinstance(second, Begin)
    assert (first.generation, first.seats) == (second.generation, second.seats)


GARBAGE = [
    "",
    "{}",
    '{"type": "Nonsense"}',
    "[1, 2",
    "\x00" * 64,
    b'{"type": "\xff"}',
    '{"a":' * 5000,
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_costs_its_sender_the_connection_and_nobody_else(
    side: Side, garbage: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with dial(side) as bad, dial(side) as good:
        bad.send(garbage)

        expect_close(bad)
        say(good, joined("node-0"))
        hear(good, Welcome)
    assert "an agent sent what is no message" in caplog.text


def test_a_message_beyond_the_cap_is_not_taken(side: Side) -> None:
    with dial(side) as bad:
        with contextlib.suppress(ConnectionClosed):  # it may be closed before all is sent
            bad.send("x" * (MESSAGE_MAX_BYTES + 1))
        expect_close(bad)


def test_a_newer_connection_of_a_node_replaces_the_older_one(side: Side) -> None:
    with dial(side) as older, dial(side) as newer:
        say(older, joined("node-0"))
        hear(older, Welcome)
        say(newer, joined("node-0"))
        hear(newer, Welcome)

        expect_close(older)
        assert NodeId("node-0") in side.controller.state.nodes
        assert side.controller.state.nodes[NodeId("node-0")].connected


def test_an_agent_of_another_version_is_sent_away(side: Side) -> None:
    with dial(side) as agent:
        say(agent, joined("node-0", version=PROTOCOL_VERSION + 1))

        expect_close(agent)


def test_a_planned_fault_is_armed_and_carried_out_only_once_it_is_on_record(side: Side) -> None:
    with dial(side) as one:
        say(one, joined("node-0"))
        arm = hear(one, Arm)
        say(one, FaultDue(index=0))
        order = hear(one, CarryOut)
    with dial(side) as one:  # it did not hear, comes back, and asks again
        say(one, joined("node-0"))
        left = hear(one, Arm)
        again = hear(one, CarryOut)
        say(one, FaultDue(index=0))
        say(one, FaultCarriedOut(index=0))
    wait_for(lambda: side.controller.state.carried_out == {0})

    assert isinstance(arm, Arm)
    assert arm.faults[0]["fault"]["rank"] == 1
    assert isinstance(left, Arm)
    assert left.faults == ()
    assert isinstance(order, CarryOut)
    assert isinstance(again, CarryOut)
    assert again.order != order.order
    assert [event.index for event in side.events if isinstance(event, FaultInjected)] == [0]


def test_a_port_that_is_taken_is_said_to_be(side: Side) -> None:
    port = int(side.server.url.rpartition(":")[2])

    with pytest.raises(PortInUseError, match=str(port)):
        Server(side.world, TOKEN, port=port)
