"""The ranks of one generation: what they wait for, how far they are, and what holds them up.

Nodes that do the same at the same time are one entry on the agenda, so that a world of thousands
of nodes costs what one of a few does; with jitter each node is an entry of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain

import numpy as np

from orchestrator.agent.shards import Lineage
from orchestrator.protocol.ids import NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import (
    MARKS,
    Begin,
    PreparationFailed,
    Prepared,
    RankExited,
    RanksTroubled,
    Reached,
    RendezvousOffered,
)
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.seats import ranks_by_node
from orchestrator.worlds.simulated.cluster import Cluster, Nodes
from orchestrator.worlds.simulated.fetching import Tiers, apart, bring, tier_of
from orchestrator.worlds.simulated.flaws import Death, Flaws
from orchestrator.worlds.simulated.node import Judge, Save, SimNode
from orchestrator.worlds.simulated.pace import Pace
from orchestrator.worlds.simulated.profile import Constant

CLEARED, SEATED, FORMED, RESTORED, STEPPED, FINISHED = range(1, len(MARKS))


_SOUND = Flaws()


class Team:
    """One generation.

    Args:
        cluster: the machines.
        order: what starts it.
        steps: that the run has in all.
        moved: called when it has done its first step, or goes at another speed.
        flaws: of the job.

    Attributes:
        generation: which.
        seats: node of each rank.
        members: its nodes, in rank order.
        ranks: those of each of them.
        place_R: which of them each rank is on, index into `members`.
        dead: ranks whose process ended.
        still: ranks that do not move: the state that the kernel shows of them, T or R (it spins).
        pace: how far it has trained; None before its first step.
        origins: per rank that was restored, the save that it had.
    """

    def __init__(
        self,
        cluster: Cluster,
        order: Begin,
        steps: int,
        moved: Callable[[Team], None],
        flaws: Flaws = _SOUND,
    ) -> None:
        self._cluster, self._order, self._moved = cluster, order, moved
        self._flaws = flaws
        self.generation, self.seats = order.generation, order.seats
        self.ranks = ranks_by_node(order.seats)
        self.members = [cluster.nodes[name] for name in self.ranks]
        cluster.members = (order.generation, len(self.members))
        self._steps, self._step_s = Step(steps), float("inf")
        self._marks = {node.id: 0 for node in self.members}
        self._at_mark = {0: len(self.members)}
        self._announced: set[NodeId] = set()
        self._prepared: set[NodeId] = set()
        self._gone: set[NodeId] = set()
        self.dead: set[Rank] = set()
        self.still: dict[Rank, str] = {}
        self.pace: Pace | None = None
        self.stopped_at: Seconds | None = None
        self.origins: dict[Rank, Save] = {}
        lineage = Lineage(order.generation, order.restore, Step(-1), order.ancestors)
        self._judge = Judge(lineage)
        self._apart = apart(order)
        self._expected = -1
        self._under_way = 0
        self._cold: set[NodeId] = set()
        """Nodes that start a process before they are seated."""
        self._heard: tuple[NodeId, ...] = ()
        self._unheard, self._idle = frozenset(self.ranks), frozenset[NodeId]()
        counts = [len(own) for own in self.ranks.values()]
        self.place_R = np.empty(len(order.seats), np.int64)
        self.place_R[np.fromiter(chain.from_iterable(self.ranks.values()), np.int64)] = np.repeat(
            np.arange(len(counts)), counts
        )

    @property
    def start(self) -> Step:
        """The step from which it continues."""
        return self._order.restore or Step(0)

    @property
    def restore(self) -> Step | None:
        """The step whose state it restores; None for the seed."""
        return self._order.restore

    def ranks_of(self, node: NodeId) -> tuple[Rank, ...]:
        """Return the ranks that have their seat on a node."""
        return self.ranks.get(node, ())

    def buddy_of(self, node: NodeId) -> NodeId | None:
        """Return where a node copies what its ranks stage."""
        return self._order.buddies.get(node)

    def silent(self, heard: tuple[NodeId, ...]) -> frozenset[NodeId]:
        """Return its nodes that are not heard."""
        self._compare(heard)
        return self._unheard

    def idle(self, heard: tuple[NodeId, ...]) -> frozenset[NodeId]:
        """Return the nodes that are heard and have no seat."""
        self._compare(heard)
        return self._idle

    def _compare(self, heard: tuple[NodeId, ...]) -> None:
        """Find out who of thousands is heard: the same are, at nearly every look."""
        if self._heard is not heard:
            self._heard, there = heard, frozenset(heard)
            self._unheard = frozenset(self.ranks.keys() - there)
            self._idle = there.difference(self.ranks)

    @property
    def marks(self) -> Iterable[int]:
        """How far each of its nodes has come, index into MARKS."""
        return self._marks.values()

    @property
    def raises_at(self) -> Step | None:
        """The step that will not work out, if there is one."""
        return self._flaws.raises_at

    @property
    def whole(self) -> bool:
        """Whether every rank runs: nobody died, stands still, or was taken away."""
        return not (self.dead or self.still or self._gone)

    @property
    def going_on(self) -> bool:
        """Whether something is under way that all of it waits for."""
        return self._under_way > 0

    @property
    def training(self) -> bool:
        """Whether it has done its first step."""
        return self.pace is not None

    # From the order to the first step -----------------------------------------------------------

    def begin(self, nodes: Nodes) -> None:
        """Have nodes take up the order; those that did before are not touched."""
        new = [n for n in nodes if n.alive and n.generation < self.generation]
        had = [n for n in new if n.ranks]
        # Not `not n.ranks` once they have begun: by then they have the new ones.
        had_none = [n for n in new if not n.ranks]
        dismissed = frozenset(self._order.dismiss)
        self._cold.update(n.id for n in new if n.fresh or not dismissed.isdisjoint(n.ranks))
        for node in new:
            node.begin(self.ranks_of(node.id), self._judge)
        profile = self._cluster.profile
        self._after(profile.stop, had, self._clear)
        self._clear(had_none)

    def _clear(self, nodes: Nodes) -> None:
        self._reach(nodes, CLEARED)
        profile = self._cluster.profile
        self._after(profile.warm, [n for n in nodes if n.id in self._cold], self._seat)
        self._after(profile.seat, [n for n in nodes if n.id not in self._cold], self._seat)
        self._prepare(nodes)

    def _seat(self, nodes: Nodes) -> None:
        self._reach(nodes, SEATED)
        for node in nodes:
            node.fresh = False
            if self._flaws.refuses:
                for rank in node.ranks:
                    self.end(
                        rank,
                        Death(78, "MisconfiguredError", self._flaws.refuses, misconfigured=True),
                    )
            if Rank(0) in node.ranks:
                address = f"{node.id}:{self.generation}"
                self._cluster.say(
                    [node], RendezvousOffered(generation=self.generation, address=address)
                )
        self.move()

    def announce(self, nodes: Nodes) -> None:
        """Tell nodes where the store of this generation is."""
        self._announced |= {n.id for n in nodes if n.generation == self.generation}
        self.move()

    def move(self) -> None:
        """Go on with whatever all have waited for, if nothing holds it up any more."""
        if not self.whole:
            return
        lowest = self.lowest
        profile = self._cluster.profile
        if lowest == SEATED and len(self._announced) == len(self.members):
            self._once(FORMED, profile.rendezvous, self._form)
        elif lowest == FORMED and len(self._prepared) == len(self.members):
            self._once(RESTORED, profile.load, self._restored)
        elif lowest == RESTORED:
            self._once(STEPPED, profile.first_step, self._step)

    def _once(self, mark: int, takes: Constant, act: Callable[[Nodes], None]) -> None:
        """Do next what takes all of them, unless that is under way."""
        if self._expected >= mark:
            return
        self._expected = mark

        def unless_broken(nodes: Nodes) -> None:
            if self.whole:
                act(nodes)
            else:
                self._expected = mark - 1

        self._after(takes, self.members, unless_broken)

    def _form(self, nodes: Nodes) -> None:
        self._reach(nodes, FORMED)
        self.move()

    def _restored(self, nodes: Nodes) -> None:
        self._reach(nodes, RESTORED)
        self.move()

    def _step(self, nodes: Nodes) -> None:
        self._reach(nodes, STEPPED)
        if self.pace is None and self.lowest >= STEPPED:
            first = Step(min(self.start + 1, self._steps))
            self.pace = Pace(self._cluster.agenda.now, first, self._steps, self._step_s)
            self._moved(self)

    def _reach(self, nodes: Nodes, mark: int) -> None:
        self._mark(nodes, mark)
        if nodes:
            self._cluster.say(nodes, Reached(generation=self.generation, mark=mark))

    @property
    def finished(self) -> bool:
        """Whether all steps are done and every node has said so."""
        return self.lowest == FINISHED

    def finish(self) -> None:
        """Enter that all steps are done."""
        self._mark(self.members, FINISHED)

    def _mark(self, nodes: Nodes, mark: int) -> None:
        marks = self._marks
        left = Counter([marks[node.id] for node in nodes])
        for node in nodes:
            node.mark = marks[node.id] = mark
        for before, count in left.items():
            self._at_mark[before] -= count
        self._at_mark[mark] = self._at_mark.get(mark, 0) + len(nodes)

    @property
    def lowest(self) -> int:
        """How far its least advanced node has come, index into MARKS."""
        return min(mark for mark, count in self._at_mark.items() if count)

    @property
    def in_step(self) -> bool:
        """Whether its nodes have all come as far."""
        return sum(count > 0 for count in self._at_mark.values()) == 1

    # State --------------------------------------------------------------------------------------

    def _prepare(self, nodes: Nodes) -> None:
        """Bring the state of their ranks to nodes, each in the time of its slowest tier."""
        profile = self._cluster.profile
        by_tier: dict[str, list[SimNode]] = defaultdict(list)
        for node in nodes:
            tier = tier_of(self._order, node) if node.id in self._apart else "own"
            by_tier[tier].append(node)
        self._bring(by_tier["own"])
        self._after(profile.fetch, by_tier["fetched"], self._bring)
        self._after(profile.read, by_tier["durable"], self._bring)
        self._after(
            profile.read,
            by_tier["shared"],
            lambda read: self._after(profile.fetch, read, self._bring),
        )

    def _bring(self, nodes: Nodes) -> None:
        done: dict[Tiers, list[SimNode]] = {}
        cluster, order, origins, apart = self._cluster, self._order, self.origins, self._apart
        for node in nodes:
            brought = bring(cluster, order, node, origins, apart=node.id in apart)
            if isinstance(brought, PreparationFailed):
                cluster.say([node], brought)
                continue
            self._prepared.add(node.id)
            done.setdefault(brought, []).append(node)
        # What ranks read for themselves, nobody has in memory.
        prepares = self.restore is not None and not self._order.cut_anew
        for tiers, alike in done.items() if prepares else ():
            fact = Prepared(
                generation=self.generation,
                step=self.start,
                own=tiers.own,
                fetched=tiers.fetched,
                durable=tiers.durable,
                reads=tiers.durable,
                seconds=0.0,
            )
            self._cluster.say(alike, fact)
        self.move()

    # What breaks --------------------------------------------------------------------------------

    def end(self, rank: Rank, death: Death) -> None:
        """End the process of a rank; its agent says so, and the others notice in their own way."""
        node = self._cluster.nodes[self.seats[rank]]
        if rank in self.dead or node.generation != self.generation:
            return
        at = self._cluster.now
        phase = RankPhase.FORWARD if self.training else RankPhase.STARTING
        fact = RankExited(
            generation=self.generation,
            rank=rank,
            pid=self.generation * len(self.seats) + rank,
            code=death.code,
            phase=int(phase),
            step=self.pace.done(at) if self.pace is not None else self.start,
            kind=death.kind,
            message=death.words,
            traceback=death.traceback,
            misconfigured=death.misconfigured,
        )
        self.dead.add(rank)
        self.still.pop(rank, None)
        self._stop()
        self._after(self._cluster.profile.exit, [node], partial(self._cluster.say, fact=fact))
        self.trouble(f"rank {rank} closed the connection")

    def fail(self) -> None:
        """Have the step under way not work out, on any rank."""
        words = f"step {self._flaws.raises_at} does not work out"
        for rank in range(len(self.seats)):
            self.end(Rank(rank), Death(1, "ArithmeticError", words))

    def trouble(self, words: str) -> None:
        """Have the collectives of whoever is left fail, once their library notices."""
        if not self.training:
            return

        def fail(nodes: Nodes) -> None:
            if not self.whole:
                fact = RanksTroubled(generation=self.generation, ranks=(), message=words)
                self._cluster.say(nodes, fact)

        self._after(self._cluster.profile.trouble, self.members, fail)

    def freeze(self, rank: Rank, state: str) -> None:
        """Have a rank stand still: T if the kernel stopped it, R if it runs in circles."""
        if rank not in self.dead:
            self.still[rank] = state
            self._stop()

    def thaw(self, rank: Rank) -> None:
        """Have a rank go on that stood still."""
        if self.still.pop(rank, None) is not None:
            self._resume()

    def lose(self, node: SimNode) -> None:
        """Take the ranks of a node away."""
        if node.id in self._marks:
            self._gone.add(node.id)
            self._stop()
            self.trouble(f"{node.id} closed the connection")

    def set_speed(self, step_s: float) -> None:
        """Have steps take this long, as soon as nothing holds them up."""
        self._step_s = step_s
        if self.pace is not None and self.whole:
            self.pace.change(self._cluster.agenda.now, step_s)
            self._moved(self)

    def _stop(self) -> None:
        if self.pace is not None and self.stopped_at is None:
            self.stopped_at = self._cluster.agenda.now
            self.pace.change(self._cluster.agenda.now, float("inf"))

    def _resume(self) -> None:
        if not self.whole:
            return
        self.stopped_at = None
        self.set_speed(self._step_s)
        self.move()

    # Time ---------------------------------------------------------------------------------------

    def _after(self, takes: Constant, nodes: Nodes, act: Callable[[Nodes], None]) -> None:
        """Do something with nodes once each has had its time, if they are still of this team."""
        self._under_way += 1

        def due(those: Nodes) -> None:
            self._under_way -= 1
            left = [n for n in those if n.alive and n.generation == self.generation]
            if left:
                act(left)

        self._cluster.each_later(takes, nodes, due)
