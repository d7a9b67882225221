"""What a world sends to agents that join: after a lost connection, and after a take-over."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from orchestrator import compose
from orchestrator.core.decisions import (
    AnnounceRendezvous,
    CommitCheckpoint,
    ProbeRanks,
    SearchCheckpoints,
    StartGeneration,
)
from orchestrator.core.events import (
    CheckpointFound,
    CommitFailed,
    ControllerStarted,
    Event,
    FaultInjected,
    NodeDisconnected,
    NodeLost,
    Reported,
    StopRequested,
    Telemetry,
    Tick,
    Together,
)
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import (
    MARKS,
    PROTOCOL_VERSION,
    Announce,
    Arm,
    Beat,
    Begin,
    CarryOut,
    FaultCarriedOut,
    FromAgent,
    Joined,
    Probe,
    Reached,
    Receipt,
    StepReport,
    ToAgent,
    Welcome,
    read_to_agent,
)
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds import agents
from orchestrator.worlds.agents import AgentWorld
from orchestrator.worlds.faults import Schedule
from orchestrator.worlds.orders import Orders
from orchestrator.worlds.vault import Vault
from tests import runfiles
from tests.conftest import Cluster

PLAN = """
kind: FaultPlan
faults:
  - {when: {after: 2s}, fault: freeze-rank, rank: 0, for: 1s}
"""


class Wire:
    """A connection that keeps what is sent on it."""

    def __init__(self) -> None:
        self.sent: list[ToAgent] = []
        self.closed = ""

    def send(self, data: bytes) -> None:
        self.sent.append(read_to_agent(data))

    def close(self, reason: str) -> None:
        self.closed = reason

    def peers(self) -> list[dict[NodeId, str]]:
        """Return the addresses in each `Begin` that was sent, oldest first."""
        return [message.peers for message in self.sent if isinstance(message, Begin)]

    def orders(self) -> list[int]:
        return [message.index for message in self.sent if isinstance(message, CarryOut)]


class Side:
    """A controller that trains already, and the world of the one that takes over from it."""

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster()
        self.folder = folder
        self.world = self._world()
        self.wires: dict[str, Wire] = {}

    def _world(self) -> AgentWorld:
        run = self.cluster.run
        limits = self.cluster.state.timeouts
        self.vault = Vault(run, str(self.folder), self.cluster.at, limits=limits)
        return AgentWorld(
            run,
            limits,
            clock=self.cluster.at,
            vault=self.vault,
            schedule=Schedule(compose.parse(PLAN, FaultPlan, "plan.yaml").drawn()),
        )

    def take_over(self) -> None:
        """The controller is killed, and another one goes on from what is on record."""
        self.vault.settle(10)
        self.world = self._world()
        self.wires = {}
        self.world.resume(self.cluster.state, self.cluster.entries)
        incarnation = self.cluster.state.incarnation + 1
        self._handle(ControllerStarted(at=self.cluster.at(), incarnation=incarnation))

    def join(self, node: str, *, port: int, generation: int, incarnation: int = 1) -> Wire:
        """A node connects, and says in which generation it is."""
        wire = self.wires[node] = Wire()
        joined = Joined(
            node=NodeId(node),
            version=PROTOCOL_VERSION,
            incarnation=incarnation,
            pid=1,
            peer_address=f"127.0.0.1:{port}",
            generation=Generation(generation),
            mark=MARKS.index("stepped") if generation else 0,
        )
        self.say(node, joined)
        return wire

    def say(self, node: str, message: FromAgent) -> None:
        """Hand in a message as the server does, and carry out what comes of it."""
        self.cluster.after(0.01)
        self.world.take(self.wires[node], message)
        for event in self.world.events():
            self._handle(event)
            if isinstance(event, Tick):
                break

    def _handle(self, event: Event) -> None:
        for decision in self.cluster.tell(event):
            self.world.carry_out(decision)


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    side = Side(tmp_path)
    side.cluster.start()
    yield side
    side.vault.settle(10)


RECEIPTS = (Receipt(0, 32, "0" * 64),)
AT = {f"node-{n}": f"127.0.0.1:{n}" for n in range(2)}


def test_who_joins_a_successor_first_is_told_where_its_buddy_is_when_that_joins(side: Side) -> None:
    side.take_over()
    first = side.join("node-0", port=0, generation=1)
    assert first.peers() == [{}]

    side.join("node-2", port=2, generation=0)
    assert len(first.peers()) == 1

    second = side.join("node-1", port=1, generation=1)

    assert first.peers()[1:] == [{"node-1": AT["node-1"]}]
    assert second.peers() == [{"node-0": AT["node-0"]}]


def test_a_begin_that_was_lost_with_the_controller_reaches_both_with_every_address(
    side: Side,
) -> None:
    side.cluster.train(10)
    side.cluster.hold(10)
    side.cluster.exit(1, step=10)
    assert side.cluster.state.generation == 2
    side.take_over()

    behind = side.join("node-1", port=1, generation=1)
    there = side.join("node-0", port=0, generation=2)

    for wire, node, buddy in ((behind, "node-1", "node-0"), (there, "node-0", "node-1")):
        (*_, last) = [message for message in wire.sent if isinstance(message, Begin)]
        assert (last.generation, last.restore) == (2, 10)
        assert last.buddies == {node: buddy}
        assert last.peers == {buddy: AT[buddy]}


def test_a_node_is_told_of_its_own_ranks_and_whom_it_calls_and_of_no_others(side: Side) -> None:
    side.cluster.train(10)
    side.cluster.hold(10)
    side.take_over()
    wires = [side.join(f"node-{n}", port=n, generation=1) for n in range(3)]

    for decision in side.cluster.exit(1, step=10):
        side.world.carry_out(decision)

    one, two = (next(m for m in reversed(w.sent) if isinstance(m, Begin)) for w in wires[:2])
    assert (one.world_size, one.ranks, one.seats) == (4, (0, 1), ("node-0", "node-0"))
    assert (two.world_size, two.ranks, two.seats) == (4, (2, 3), ("node-1", "node-1"))
    assert (one.sources, two.sources) == (one.seats, two.seats)
    assert (one.shard_of, two.shard_of) == ((0, 1), (0, 1)), "two replicas of two shards"
    assert (one.writers, two.writers) == ((0, 1), ())
    assert (one.peers, two.peers) == ({"node-1": AT["node-1"]}, {"node-0": AT["node-0"]})
    assert not [message for message in wires[2].sent if isinstance(message, Begin)]


def test_ranks_are_measured_one_after_the_other_wherever_they_are(side: Side) -> None:
    side.take_over()
    wires = [side.join(f"node-{n}", port=n, generation=1) for n in range(2)]
    order = ProbeRanks(
        generation=Generation(1),
        reason="it is slow",
        number=7,
        ranks=(Rank(2), Rank(0), Rank(3)),
        nodes=(NodeId("node-1"), NodeId("node-0"), NodeId("node-1")),
        within_s=0.75,
    )

    side.world.carry_out(order)

    peer, own = (next(m for m in reversed(w.sent) if isinstance(m, Probe)) for w in wires)
    assert (own.ranks, own.begins_s, own.within_s) == ((2, 3), (0.0, 0.5), 0.25)
    assert (peer.ranks, peer.begins_s, peer.within_s) == ((0,), (0.25,), 0.25)


def test_a_store_that_was_announced_is_news_to_a_node_that_comes_back_only(side: Side) -> None:
    side.take_over()
    wire = side.join("node-0", port=0, generation=1)
    other = side.join("node-1", port=1, generation=1)
    order = AnnounceRendezvous(generation=Generation(1), address="there:1", reason="a test")
    side.world.carry_out(order)

    again = side.join("node-1", port=1, generation=1)
    side.world.carry_out(order)
    side.world.carry_out(msgspec.structs.replace(order, address="there:2"))

    def heard(wire: Wire) -> list[str]:
        return [m.address for m in wire.sent if isinstance(m, Announce)][-3:]

    assert heard(wire)[-2:] == ["there:1", "there:2"]
    assert heard(other)[-1:] == ["there:1"]
    assert heard(again)[-2:] == ["there:1", "there:2"]


def test_an_agent_that_comes_back_with_another_port_is_called_there_by_those_that_call_it(
    side: Side,
) -> None:
    side.take_over()
    wire = side.join("node-0", port=0, generation=1)
    side.join("node-1", port=1, generation=1)
    side.join("node-2", port=2, generation=0)
    before = len(wire.peers())

    side.join("node-2", port=22, generation=0, incarnation=2)
    assert len(wire.peers()) == before, "nobody calls a node without a seat that holds nothing"

    side.join("node-1", port=11, generation=1)
    assert wire.peers()[before:] == [{"node-1": "127.0.0.1:11"}]


def test_an_order_on_record_that_was_never_sent_is_sent_by_the_successor_until_it_is_confirmed(
    side: Side,
) -> None:
    on_record = FaultInjected(
        at=side.cluster.at(), index=0, description="x", target="rank 0", node=NodeId("node-0")
    )
    side.cluster.tell(on_record)
    side.take_over()

    assert side.join("node-1", port=1, generation=1).orders() == []
    assert side.join("node-0", port=0, generation=1).orders() == [0]
    assert side.join("node-0", port=0, generation=1).orders() == [0]

    side.say("node-0", FaultCarriedOut(index=0))

    assert side.join("node-0", port=0, generation=1).orders() == []
    side.take_over()
    assert side.join("node-0", port=0, generation=1).orders() == []


def test_an_agent_that_was_armed_by_the_predecessor_is_told_that_nothing_is_left(
    side: Side,
) -> None:
    def armed(wire: Wire) -> list[int]:
        (arm,) = [message for message in wire.sent if isinstance(message, Arm)]
        return [fault["index"] for fault in arm.faults]

    assert armed(side.join("node-0", port=0, generation=1)) == [0]
    on_record = FaultInjected(
        at=side.cluster.at(), index=0, description="x", target="rank 0", node=NodeId("node-0")
    )
    side.cluster.tell(on_record)
    side.take_over()

    assert armed(side.join("node-0", port=0, generation=1)) == []


def test_an_agent_is_welcomed_at_once_however_many_wait_to_be_looked_at(side: Side) -> None:
    wire = Wire()
    joined = Joined(
        node=NodeId("node-0"),
        version=PROTOCOL_VERSION,
        incarnation=1,
        pid=1,
        peer_address="there:1",
        generation=Generation(0),
        mark=0,
    )

    side.world.take(wire, joined)

    assert [type(message) for message in wire.sent] == [Welcome]


def test_nodes_that_have_come_as_far_together_are_told_of_together_after_their_steps(
    side: Side,
) -> None:
    side.take_over()
    for node in range(3):
        side.join(f"node-{node}", port=node, generation=1)
    first, second = (Reached(generation=Generation(1), mark=mark) for mark in (1, 2))
    beat = Beat(
        generation=Generation(1), ranks=(), phases=(), steps=(), progress=(), states="", cpu_s=(),
        stall_s=(), reports=(StepReport(Step(1), 1.0, 1.0, 1, 0.1),),
    )  # fmt: skip
    for node, message in (
        ("node-1", first), ("node-1", second), ("node-0", first), ("node-0", beat),
        ("node-2", FaultCarriedOut(index=7)), ("node-0", second),
    ):  # fmt: skip
        side.world.take(side.wires[node], message)

    events = []
    for event in side.world.events():
        events.append(event)
        if isinstance(event, Tick | Telemetry) and len(events) > 1:
            break

    steps, *told = events[:5]
    assert isinstance(steps, Telemetry)
    assert [report.step for report in steps.reports] == [1]
    assert [(type(e), getattr(e, "nodes", None) or e.node) for e in told] == [
        (Together, ("node-0", "node-1")),
        (Reported, "node-1"),
        (Reported, "node-2"),
        (Reported, "node-0"),
    ]


def test_a_queue_full_of_messages_costs_no_answer_no_loss_and_no_request_to_stop(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    side.join("node-0", port=0, generation=1)
    monkeypatch.setattr(agents, "QUEUE_MAX", 8)
    wire, generation = side.wires["node-0"], side.cluster.state.generation
    while not wire.closed:
        side.world.take(wire, FaultCarriedOut(index=7))
    assert wire.closed == "8 messages are waiting"

    order = CommitCheckpoint(
        generation=generation, reason="a test", step=Step(20), receipts=(), model="m"
    )
    side.world.carry_out(order)
    side.world.carry_out(SearchCheckpoints(generation=generation, reason="a test"))
    side.world.lose(NodeId("node-1"), "its agent ended")
    side.world.stop("a test")
    assert side.vault.settle(10)
    side.world.take(wire, None)

    expected = {CommitFailed, CheckpointFound, NodeLost, StopRequested, NodeDisconnected}
    for event in side.world.events():
        expected.discard(type(event))
        if not expected:
            break


@pytest.mark.parametrize("successor", [False, True])
def test_a_commit_of_a_generation_before_the_present_one_is_refused(
    side: Side, *, successor: bool
) -> None:
    side.cluster.train(10)
    side.cluster.hold(10)
    (started,) = [d for d in side.cluster.exit(1, step=10) if isinstance(d, StartGeneration)]
    if successor:
        side.take_over()
    else:
        side.world.carry_out(started)
    order = CommitCheckpoint(
        generation=Generation(1), reason="a test", step=Step(10), receipts=RECEIPTS, model="m"
    )

    side.world.carry_out(order)

    failed = next(e for e in side.world.events() if isinstance(e, CommitFailed))
    assert "newest epoch known is 2" in failed.reason


def test_of_pipelines_the_first_replica_writes_what_all_hold() -> None:
    parallelism = {"pp": 2, "dpReplicate": 2, "tp": 2}
    run = runfiles.fields(nodes={"count": 4, "ranksPerNode": 2}, parallelism=parallelism)
    orders = Orders(msgspec.convert(run, TrainingRun))
    seats = tuple(NodeId(f"node-{rank // 2}") for rank in range(8))
    started = StartGeneration(
        generation=Generation(1), reason="a test", seats=seats, dismiss=(), restore=None, buddies={}
    )
    orders.start(started)

    begin = orders.begin("order", {})

    assert begin.writers == (0, 1, 2, 3)
    assert begin.shard_of == (0, 1, 2, 3, 0, 1, 2, 3)
