"""The machines of a simulated cluster: who is alive, who can be reached, what gets through.

A connection is like a real one: what is said on it arrives in order, what is on its way when it
breaks is lost, and a node that connects again says everything it knows. With a `wire` it is worse
than a real one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from orchestrator.core.events import Event, NodeDisconnected, NodeLost, Reported, Together
from orchestrator.protocol.ids import Generation, NodeId, Seconds
from orchestrator.protocol.messages import Fact, Prepared, RanksTroubled, Reached
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worlds.simulated.agenda import Act, Agenda
from orchestrator.worlds.simulated.node import SimNode, stands
from orchestrator.worlds.simulated.profile import Constant, Profile
from orchestrator.worlds.simulated.store import SimStore
from orchestrator.worlds.simulated.wire import Wire

Nodes = Sequence[SimNode]
RECONNECT_S = 0.5
"""Longest that an agent waits before it calls again."""
TOGETHER_MIN = 32
"""Of so many nodes or more, what they say alike is told in one event."""


class Cluster:
    """Nodes, their connections to the controller, and a durable tier.

    Args:
        names: of the nodes.
        store: the durable tier.
        timeouts: of the run.
        profile: how long things take.
        chance: every draw comes from it.
        jitter: by which share times differ between nodes; 0 for not at all, and for speed.

    Attributes:
        agenda: what happens when.
        out: what the controller is about to be told.
        listening: whether there is a controller.
        members: nodes of the present generation, and which one that is.
        before: called before anything is said, to say first what came first.
        disturbed: called before anything happens to a node that others are spared.
        disturbances: how often that was.
        unexplained: nodes that are not heard, and of which nobody was told: since when.
        forgetful: whether nobody keeps state in memory.
        connected: called with a node that has connected.
        lost: called with a node that is lost.
        wire: carries what nodes say one by one; None for at once, in order, and once.
    """

    def __init__(
        self,
        names: Sequence[NodeId],
        store: SimStore,
        timeouts: Timeouts,
        profile: Profile,
        *,
        chance: np.random.Generator,
        jitter: float,
    ) -> None:
        self.nodes = {name: SimNode(name) for name in names}
        self._by_name = [self.nodes[name] for name in sorted(names)]
        self.store, self.timeouts, self.profile = store, timeouts, profile
        self.agenda = Agenda()
        self.out: deque[Event] = deque()
        self.listening = True
        self._chance, self._jitter = chance, jitter
        self.members: tuple[Generation, int] = (Generation(0), 0)
        self._hearing: tuple[NodeId, ...] | None = None
        self.before: Act = _nothing
        self.disturbed: Act = _nothing
        self.disturbances = 0
        self.unexplained: dict[NodeId, Seconds] = {}
        self.forgetful = False
        self.connected: Callable[[SimNode], None] = _nobody
        self.lost: Callable[[SimNode], None] = _nobody
        self.wire: Wire | None = None

    @property
    def now(self) -> Seconds:
        """The run's clock."""
        return self.agenda.now

    # Chance and time ----------------------------------------------------------------------------

    @property
    def in_step(self) -> bool:
        """Whether nodes take equally long for the same thing."""
        return self._jitter == 0

    def lasts(self, constant: Constant) -> float:
        """Return how long something takes this time, seconds."""
        takes_s = constant.drawn(self._chance)
        if self.in_step:
            return takes_s
        return takes_s * float(1 + self._jitter * self._chance.random())

    def later(self, takes: Constant, act: Act) -> None:
        """Have something happen once it has had its time."""
        self.agenda.after(self.lasts(takes), act)

    def each_later(self, takes: Constant, nodes: Nodes, act: Callable[[Nodes], None]) -> None:
        """Have something happen to nodes: to all of them at once, if they are in step."""
        if self.in_step and nodes:
            self.later(takes, partial(act, nodes))
            return
        for node in nodes:
            self.later(takes, partial(act, [node]))

    def _soon(self, act: Act) -> None:
        share = 0.0 if self.in_step else float(self._chance.random())
        self.agenda.after(RECONNECT_S * share, act)

    # What gets through --------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Have the controller know something, if there is one, after whatever came before."""
        if self.listening:
            self.before()
            self.out.append(event)

    def heard(self) -> tuple[NodeId, ...]:
        """Return the nodes whose words reach the controller as of now, sorted."""
        if self._hearing is None:
            self._hearing = tuple(node.id for node in self._by_name if node.heard)
        return self._hearing

    def disturb(self) -> None:
        """Have something happen to some nodes only."""
        self.disturbed()
        self.disturbances += 1
        self._hearing = None

    def say(self, nodes: Nodes, fact: Fact) -> None:
        """Have nodes say the same; who is not heard says it on its next connection."""
        for node in nodes if stands(fact) else ():
            node.keep(fact)
        heard = [node for node in nodes if node.heard]
        if len(heard) >= TOGETHER_MIN and isinstance(fact, Reached | Prepared | RanksTroubled):
            everybody = self.members == (fact.generation, len(heard))
            names = () if everybody else tuple(node.id for node in heard)
            self.emit(Together(at=self.now, nodes=names, fact=fact))
            return
        for node in heard:
            if self.wire is None:
                self._report(node, fact)
            else:
                self.wire.carry(
                    partial(self._report, node, fact),
                    partial(_is_on, node, node.connection),
                    partial(self.cut, node),
                )

    def _report(self, node: SimNode, fact: Fact) -> None:
        self.emit(Reported(at=self.now, node=node.id, fact=fact))

    def send(self, nodes: Nodes, act: Callable[[Nodes], None]) -> None:
        """Have nodes obey an order, once it has reached them on the connections they have now."""
        heard = [node for node in nodes if node.heard]
        connections = {node.id: node.connection for node in heard}

        def reach(those: Nodes) -> None:
            act([n for n in those if n.heard and n.connection == connections[n.id]])

        self.each_later(self.profile.order, heard, reach)

    # Connections ----------------------------------------------------------------------------------

    def connect_all(self) -> None:
        """Have every agent call, each in its own time."""
        for node in self.nodes.values():
            self._soon(partial(self.connect, node))

    def connect(self, node: SimNode) -> None:
        """Connect an agent that lives, and have it tell everything it knows."""
        if not (self.listening and node.alive and node.reachable) or node.connected:
            return
        self.disturb()
        node.connected = True
        node.connection += 1
        self.unexplained.pop(node.id, None)
        self.emit(Reported(at=self.now, node=node.id, fact=node.joined()))
        for fact in node.standing():
            self.emit(Reported(at=self.now, node=node.id, fact=fact))
        self.connected(node)

    def cut(self, node: SimNode, *, told: bool = True) -> None:
        """Break the connection of a node; it calls again, if it can."""
        if node.connected:
            self.disturb()
            node.connected = False
            if told:
                self.emit(NodeDisconnected(at=self.now, node=node.id))
            self.unexplained[node.id] = self.now
            self._soon(partial(self.connect, node))

    def part(self, node: SimNode) -> None:
        """Have nobody reach a node any more; its ranks train on."""
        self.disturb()
        node.reachable = False
        self.cut(node, told=False)

    def rejoin(self, node: SimNode) -> None:
        """Have a node be reached again."""
        self.disturb()
        node.reachable = True
        self._soon(partial(self.connect, node))

    def hush(self, node: SimNode, seconds: float) -> None:
        """Have an agent not run for a while: nothing is heard on a connection that stays open."""
        self.disturb()
        node.reachable = False
        self.unexplained[node.id] = self.now
        self.agenda.after(seconds, partial(self.rejoin, node))

    def disconnect_all(self) -> None:
        """End every connection: nobody listens any more."""
        self.disturb()
        self.listening = False
        self.out.clear()
        for node in self.nodes.values():
            node.connected = False

    # Loss and repair ------------------------------------------------------------------------------

    def lose(self, node: SimNode, *, back: bool) -> None:
        """Have a node's agent die, with its ranks and its memory; another may start there."""
        if not node.alive:
            return
        self.disturb()
        connected = node.connected
        node.die()
        self.unexplained[node.id] = self.now
        self.lost(node)
        if connected:
            self.emit(NodeDisconnected(at=self.now, node=node.id))
        gone_s = self.lasts(self.profile.gone)
        if gone_s < self.timeouts.silence_s:
            self.agenda.after(gone_s, partial(self._report_lost, node, node.incarnation))
        if back:
            self.later(self.profile.reboot, partial(self._reboot, node, node.incarnation))

    def repair(self, node: SimNode) -> None:
        """Bring a node back that was lost."""
        self._reboot(node, node.incarnation)

    def spoil_newest(self) -> None:
        """Have nobody's memory hold the newest state any more: it was of no use."""
        self.disturb()
        newest = max((save for node in self.nodes.values() for save in node.shelf), default=None)
        if newest is not None:
            for node in self.nodes.values():
                node.shelf.pop(newest, None)

    def _report_lost(self, node: SimNode, incarnation: int) -> None:
        if node.incarnation == incarnation:
            evidence = f"agent of {node.id} is gone"
            self.unexplained.pop(node.id, None)
            self.emit(NodeLost(at=self.now, node=node.id, evidence=evidence))

    def _reboot(self, node: SimNode, incarnation: int) -> None:
        if not node.alive and node.incarnation == incarnation:
            node.reboot()
            self.connect(node)


def _is_on(node: SimNode, connection: int) -> bool:
    """Whether a node is heard on this very connection."""
    return node.heard and node.connection == connection


def _nothing() -> None:
    """Have nothing to say first."""


def _nobody(node: SimNode) -> None:
    """Take no interest in a node."""
    del node
