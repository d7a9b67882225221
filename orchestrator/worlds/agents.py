"""The world of a run whose nodes are agents: messages become events, decisions become orders.

How agents come to be (processes, pods, actors) is another file's business. The server hands in
connections and messages from its own thread; everything else happens on the one thread that
iterates over `events`, so nothing here needs a lock but the queue between the two.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from orchestrator.core.decisions import (
    AbandonCheckpoint,
    AnnounceRendezvous,
    CarryOutFault,
    CatchUp,
    CommitCheckpoint,
    Decision,
    DisconnectNode,
    EndRun,
    FenceNode,
    InspectRanks,
    JudgeCheckpoint,
    JudgeDevice,
    PreflightDevices,
    ProbeRanks,
    RetainMemory,
    SearchCheckpoints,
    SetCadence,
    StartGeneration,
    WakeAt,
)
from orchestrator.core.events import (
    Event,
    FaultInjected,
    NodeDisconnected,
    NodeLost,
    Reported,
    StopRequested,
    Tick,
    Together,
)
from orchestrator.core.journal import Entry
from orchestrator.core.state import RunState
from orchestrator.faults.plan import ArmedFault
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Step
from orchestrator.protocol.messages import (
    PROTOCOL_VERSION,
    Announce,
    Arm,
    Beat,
    CarryOut,
    Farewell,
    FaultCarriedOut,
    FaultDue,
    FromAgent,
    Inspect,
    Joined,
    Preflight,
    Probe,
    Reached,
    Retain,
    SaveEvery,
    Welcome,
    encode,
)
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worlds.addresses import Addresses
from orchestrator.worlds.faults import Schedule
from orchestrator.worlds.links import Link, Links
from orchestrator.worlds.orders import Orders
from orchestrator.worlds.registrar import Registrar
from orchestrator.worlds.telemetry import Columns
from orchestrator.worlds.vault import Vault

log = logging.getLogger(__name__)
QUEUE_MAX = 65_536
"""What may wait to be looked at; beyond that an agent is cut off, and says it again later."""


class _Arrived(NamedTuple):
    at: Seconds
    link: Link
    message: FromAgent | None
    """None: the connection is closed."""


class _Known(NamedTuple):
    at: Seconds
    event: Event


class AgentWorld:
    """Agents of one run.

    Args:
        run: what is to be run.
        timeouts: derived from it.
        clock: the run's clock, seconds; safe from any thread.
        vault: the durable tier.
        schedule: planned faults.
        registrar: keeps verdicts about devices; None for nobody, and they end with the run.
    """

    def __init__(
        self,
        run: TrainingRun,
        timeouts: Timeouts,
        *,
        clock: Callable[[], Seconds],
        vault: Vault,
        schedule: Schedule,
        registrar: Registrar | None = None,
    ) -> None:
        self.run, self.timeouts, self.clock = run, timeouts, clock
        self._vault, self._registrar = vault, registrar
        self._schedule = schedule
        self._queue: deque[_Arrived | _Known] = deque()
        self._bell = threading.Event()
        """Rung when something is in the queue that is not to wait for the next tick."""
        self._links = Links()
        self._addresses = Addresses()
        self._wording = Orders(run)
        self._columns = Columns(run.world_size)
        self._seats: tuple[NodeId, ...] = ()
        self._generation = Generation(0)
        self._announced: tuple[Generation, str] | None = None
        self._introduced: set[NodeId] = set()
        """Nodes that were told of `_announced` on the connection that they have."""
        self._job = run.job()
        self._wakes: list[Seconds] = []
        self._over = False
        self._farewell: Farewell | None = None
        self._orders = 0

    # From the server's thread ---------------------------------------------------------------

    def take(self, link: Link, message: FromAgent | None) -> None:
        """Take in what arrived on a connection; None when it is closed."""
        if isinstance(message, Joined) and not self._welcome(link, message):
            return
        if message is None or len(self._queue) < QUEUE_MAX:
            self._queue.append(_Arrived(self.clock(), link, message))
            # Nobody looks at beats before the tick, and there are a thousand a second of them.
            if not isinstance(message, Beat):
                self._bell.set()
        else:
            link.close(f"{QUEUE_MAX} messages are waiting")

    def _welcome(self, link: Link, joined: Joined) -> bool:
        """Answer who joins; return whether it may.

        At once: an agent that waited behind thousands of others would give up and come again, and
        make the crowd no smaller.
        """
        if joined.version != PROTOCOL_VERSION:
            link.close(f"protocol version is {joined.version}, expected {PROTOCOL_VERSION}")
            return False
        name = self.run.metadata.name
        welcome = Welcome(
            run=name,
            run_id=name,
            version=PROTOCOL_VERSION,
            timeouts=self.timeouts,
            checkpoint_uri=self._vault.uri,
            entrypoint=self.run.spec.trainer.entrypoint,
            job=self._job,
            steps_known=self._columns.reported,
        )
        link.send(encode(welcome))
        return True

    def know(self, event: Event) -> None:
        """Take in an event that this side found out by itself. From any thread."""
        # However many wait: nobody would say it again, and there is one for an order, or a node.
        self._queue.append(_Known(event.at, event))
        self._bell.set()

    def stop(self, by: str) -> None:
        """Ask for the run to be stopped. From any thread."""
        self.know(StopRequested(at=self.clock(), by=by))

    # The world ------------------------------------------------------------------------------

    def resume(self, state: RunState, entries: Sequence[Entry]) -> None:
        """Continue from what a journal says, and from the state that replaying it led to."""
        self._seats, self._generation = state.seats, state.generation
        self._vault.begin(state.generation)
        if state.wanting:
            self._vault.hold()  # a search may have been answered already
        ranks = len(state.seats) or self.run.world_size
        self._columns.begin(state.generation, state.reached_step, ranks)
        self._compare_in(state.generation, state.seats)
        self._schedule.resume(entry.event for entry in entries)
        self._wording.resume(state, entries)
        if self._wording.started is not None:
            self._addresses.begin(self._wording.started)

    def events(self) -> Iterator[Event]:
        """Yield what happens, until the run has ended and its agents have been told."""
        next_tick = self.clock()
        while not self._over:
            due = min([next_tick, *self._wakes[:1]])
            self._wait(due - self.clock())
            yield from self._take_in()
            now = self.clock()
            if now < min([next_tick, *self._wakes[:1]]):
                continue
            while self._wakes and self._wakes[0] <= now:
                heapq.heappop(self._wakes)
            # Counted from now: after a pause of this process there is no crowd of late ticks.
            next_tick = Seconds(now + self.timeouts.tick_s)
            yield from self._columns.compared(now)
            yield self._columns.telemetry(now) or Tick(at=now)
            yield from self._due_faults(now)

    def carry_out(  # noqa: C901, PLR0912 - one case per decision
        self, decision: Decision
    ) -> None:
        """Carry out a decision; never blocks, what comes of it comes back as an event."""
        order = self._next_order(decision.generation)
        match decision:
            case StartGeneration():
                self._start(order, decision)
            case CatchUp(node=node):
                if not self._addresses.told(node):
                    self._begin(order, node)
            case AnnounceRendezvous(generation=generation, address=address):
                self._announce(Announce(order=order, generation=generation, address=address))
            case FenceNode(generation=generation, node=node):
                self._links.send(node, self._wording.fence(order, generation))
            case DisconnectNode(node=node, reason=reason):
                self._links.hang_up(node, reason)
            case RetainMemory(generation=generation, step=step):
                self._links.send_all(
                    self._links, Retain(order=order, generation=generation, step=step)
                )
            case SetCadence(generation=generation, node=node, cadence=cadence):
                said = SaveEvery(order=order, generation=generation, cadence=cadence)
                self._links.send(node, said)
            case SearchCheckpoints(number=number, onsets=onsets, graded=graded):
                self._vault.search(self.know, number, onsets, graded=graded is True)
            case AbandonCheckpoint(reason=reason):
                log.warning("%s", reason)
            case JudgeCheckpoint():
                self._vault.judge(decision, self.know)
            case CommitCheckpoint():
                self._vault.commit(decision, self.know)
            case CarryOutFault(index=index, node=node):
                if node:
                    self._links.send(node, CarryOut(order=order, index=index))
                else:
                    self._schedule.end_this_process()
            case ProbeRanks():
                self._probe(order, decision)
            case InspectRanks():
                asked = Inspect(
                    order=order,
                    generation=decision.generation,
                    suspects=decision.suspects,
                    within_s=decision.within_s,
                )
                self._links.send_all(decision.nodes, asked)
            case JudgeDevice():
                if self._registrar is not None:
                    self._registrar.judge(decision, self.know)
            case PreflightDevices(node=node, serials=serials, within_s=within_s):
                self._links.send(node, Preflight(order=order, serials=serials, within_s=within_s))
            case EndRun(reason=reason):
                self._farewell = Farewell(order=order, reason=reason)
                self._links.send_all(self._links, self._farewell)
                self._over = True
            case WakeAt(at=at):
                heapq.heappush(self._wakes, at)

    def see_off(self, within_s: float, expected: Iterable[NodeId] = ()) -> list[NodeId]:
        """Wait until agents have closed their connections; return those that have not.

        Args:
            within_s: seconds to wait at most.
            expected: nodes that are not connected yet and still have to be told.
        """
        assert self._farewell is not None, "the run has not ended"
        awaited = set(expected) | set(self._links)
        deadline = time.monotonic() + within_s
        while awaited and (left := deadline - time.monotonic()) > 0:
            self._wait(left)
            while self._queue:
                arrived = self._queue.popleft()
                if isinstance(arrived, _Arrived):
                    awaited -= self._see_off(arrived)
        return sorted(awaited)

    def _see_off(self, arrived: _Arrived) -> set[NodeId]:
        """Say farewell to who comes; return who has gone."""
        assert self._farewell is not None
        if isinstance(arrived.message, Joined):
            for _ in self._join(arrived.at, arrived.link, arrived.message):
                self._links.send(arrived.message.node, self._farewell)
        elif arrived.message is None:
            node = self._links.node_of(arrived.link)
            self._links.forget(arrived.link)
            return set() if node is None else {node}
        return set()

    def settle(self, within_s: float) -> bool:
        """Wait until what was ordered of the durable tier is done; return whether it is.

        So long it is also waited for that verdicts about devices are on record.
        """
        deadline = time.monotonic() + within_s
        done = self._vault.settle(within_s)
        left_s = max(deadline - time.monotonic(), 0.0)
        return (self._registrar is None or self._registrar.settle(left_s)) and done

    # Coming in ------------------------------------------------------------------------------

    def _wait(self, timeout_s: float) -> None:
        """Wait until something has arrived that is not to wait for the next tick."""
        self._bell.wait(max(timeout_s, 0.0))
        # Before the queue is looked at: what comes after that rings again.
        self._bell.clear()

    def _take_in(self) -> Iterator[Event]:
        """Yield what has arrived by now.

        No less: at a tick, a node is not silent whose beat is here. And no more: however much
        arrives, there are ticks. A world of thousands of nodes says of each mark as often that they
        have reached it; what of that has come together is told together.
        """
        reached: dict[Reached, list[NodeId]] = {}
        at = Seconds(0.0)
        for _ in range(len(self._queue)):
            arrived = self._queue.popleft()
            message = arrived.message if isinstance(arrived, _Arrived) else None
            if isinstance(arrived, _Arrived) and isinstance(message, Reached):
                at, node = arrived.at, self._links.node_of(arrived.link)
                if node is not None:
                    reached.setdefault(message, []).append(node)
                continue
            if reached and not isinstance(message, Beat):
                yield from self._tell(at, reached)
                reached = {}
            yield from self._translate(arrived)
            if self._over:
                return
        yield from self._tell(at, reached)

    def _tell(self, at: Seconds, reached: dict[Reached, list[NodeId]]) -> Iterator[Event]:
        """Yield which nodes have reached what, in the order of the marks."""
        if reached:
            yield from self._columns.flush(at)
        for fact, nodes in sorted(reached.items(), key=lambda of: (of[0].generation, of[0].mark)):
            if len(nodes) == 1:
                yield Reported(at=at, node=nodes[0], fact=fact)
            else:
                yield Together(at=at, fact=fact, nodes=tuple(sorted(nodes)))

    def _translate(self, arrived: _Arrived | _Known) -> Iterator[Event]:
        if isinstance(arrived, _Known):
            yield arrived.event
            return
        at, link, message = arrived
        node = self._links.node_of(link)
        match message:
            case Joined():
                yield from self._join(at, link, message)
            case _ if node is None:
                pass  # from a connection that a newer one of the same node has replaced
            case None:
                self._links.forget(link)
                yield NodeDisconnected(at=at, node=node)
            case Beat():
                self._columns.take(node, message)
            case FaultDue(index=index):
                yield from self._inject(at, self._schedule.asked_for(index, node), node)
            case _:
                if isinstance(message, FaultCarriedOut):
                    self._schedule.confirm(message.index)
                # Steps first: a shard is never known before the steps that led to it.
                yield from self._columns.flush(at)
                yield Reported(at=at, node=node, fact=message)

    def _join(self, at: Seconds, link: Link, joined: Joined) -> Iterator[Event]:
        self._links.join(joined.node, link)
        self._introduced.discard(joined.node)
        self._addresses.joined(joined.node, joined.peer_address)
        self._remind(joined)
        self._watch(joined)
        yield Reported(at=at, node=joined.node, fact=joined)

    def _remind(self, joined: Joined) -> None:
        """Send again what an earlier connection, or an earlier controller, may have lost."""
        node = joined.node
        # Even if nothing is left: a controller before this one may have armed it with more.
        left = tuple(msgspec.to_builtins(fault) for fault in self._schedule.left())
        self._links.send(node, Arm(order=self._next_order(self._generation), faults=left))
        for index in self._schedule.owed(node):
            self._links.send(node, CarryOut(order=self._next_order(self._generation), index=index))
        # One that comes from another generation is the controller's to decide on.
        if joined.generation == self._generation and node in self._seats:
            self._begin(self._next_order(self._generation), node)
        for caller in self._addresses.waiting(node):
            self._begin(self._next_order(self._generation), caller)

    def _watch(self, joined: Joined) -> None:
        """Do what this kind of world can to notice early that a node's agent is gone."""

    def lose(self, node: NodeId, evidence: str) -> None:
        """Report that a node's agent is gone for certain. From any thread."""
        self.know(NodeLost(at=self.clock(), node=node, evidence=evidence))

    # Planned faults --------------------------------------------------------------------------

    def _due_faults(self, now: Seconds) -> Iterator[Event]:
        seats = self._seats
        for armed in self._schedule.due(now, self._columns.reported, set(seats), len(seats)):
            target = armed.fault
            node = target.node
            if target.rank is not None:
                node = self._seats[target.rank]
            yield from self._inject(now, armed, NodeId(node or ""))

    def _inject(self, at: Seconds, armed: ArmedFault | None, node: NodeId) -> Iterator[Event]:
        if armed is None:
            return
        self._schedule.injected(armed.index, node)
        fault = armed.fault
        target = f"rank {fault.rank}" if fault.rank is not None else node or "controller"
        yield FaultInjected(
            at=at, index=armed.index, description=fault.describe(), target=target, node=node
        )

    # Going out --------------------------------------------------------------------------------

    def _start(self, order: str, decision: StartGeneration) -> None:
        restore = decision.restore
        if decision.generation > self._generation:
            self._vault.begin(decision.generation)
            reached = restore.step if restore else Step(0)
            self._columns.begin(decision.generation, reached, len(decision.seats))
            self._compare_in(decision.generation, decision.seats)
            self._wording.start(decision)
            self._addresses.begin(decision)
        self._generation, self._seats = decision.generation, decision.seats
        for node in self._wording.nodes:
            self._begin(order, node)

    def _compare_in(self, generation: Generation, seats: tuple[NodeId, ...]) -> None:
        """Compare the digests of this world from now on; it may have fewer replicas."""
        layout = self.run.layout
        layout = layout._replace(dp_replicate=len(seats) // layout.shard_count)
        self._columns.ballots.begin(generation, layout, seats)

    def _announce(self, order: Announce) -> None:
        """Tell the nodes of the world where their store is, if they were not told before.

        It is decided again for each node that comes back, which is no news to the others.
        """
        if self._announced != (order.generation, order.address):
            self._announced = (order.generation, order.address)
            self._introduced.clear()
        new = [
            node
            for node in self._wording.nodes
            if node not in self._introduced and node in self._links
        ]
        self._links.send_all(new, order)
        self._introduced.update(new)

    def _probe(self, order: str, decision: ProbeRanks) -> None:
        each_s = decision.within_s / len(decision.ranks)
        for node in dict.fromkeys(decision.nodes):
            turns = [turn for turn, on in enumerate(decision.nodes) if on == node]
            asked = Probe(
                order=order,
                generation=decision.generation,
                number=decision.number,
                ranks=tuple(decision.ranks[turn] for turn in turns),
                within_s=each_s,
                begins_s=tuple(turn * each_s for turn in turns),
            )
            self._links.send(node, asked)

    def _begin(self, order: str, node: NodeId) -> None:
        """Send a seated node the present generation, if it lacks that or an address it needs."""
        peers = self._addresses.news(node, self._links) if node in self._links else None
        if peers is not None:
            self._links.send(node, self._wording.begin_on(node, order, peers))

    def _next_order(self, generation: Generation) -> str:
        self._orders += 1
        return f"{generation}.{self._orders}"
