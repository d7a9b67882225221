"""The simulated world: what nodes do becomes events, decisions become orders, in virtual time.

The same seed gives the same events. Nothing is simulated that nobody would see: a world that
trains is a formula; `looks.py` says when it is looked at.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from orchestrator.agent.shards import Lineage
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
    CheckpointJudged,
    DrainCancelled,
    DrainRequested,
    Event,
    StopRequested,
)
from orchestrator.core.journal import Entry
from orchestrator.core.state import RunState
from orchestrator.faults.plan import ArmedFault
from orchestrator.policy.switches import PLANNED_SWAP, STRAGGLER_SWAP
from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.cutting import cut_of
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Step
from orchestrator.protocol.messages import RanksFinished
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worlds.orders import Orders
from orchestrator.worlds.simulated.agenda import NEVER
from orchestrator.worlds.simulated.asking import how_fast_they_are, where_they_stand
from orchestrator.worlds.simulated.breaking import Breaking
from orchestrator.worlds.simulated.cluster import Cluster, Nodes
from orchestrator.worlds.simulated.corruption import Corruption
from orchestrator.worlds.simulated.devices import SimLedger
from orchestrator.worlds.simulated.flaws import Flaws
from orchestrator.worlds.simulated.looks import Looks
from orchestrator.worlds.simulated.node import Judge, SimNode
from orchestrator.worlds.simulated.profile import Profile
from orchestrator.worlds.simulated.saving import Saving
from orchestrator.worlds.simulated.store import SimStore
from orchestrator.worlds.simulated.team import Team
from orchestrator.worlds.simulated.telling import Telling

_BEFORE_S = 1e-6
FOUND_STEPS = 16
"""Within which a rank that has become slow is found and measured."""
WAITS_TIMES, WAITED_TIMES = 0.5, 2.0
"""Times as long as it takes until a slow node has cost as much as a swap: between the two it is
looked at closely. That is if no other is as slow and restarts take what they should; who costs as
much only later, as one that another has hidden, is seen whenever somebody looks."""
_Request = DrainRequested | DrainCancelled


class SimulatedWorld:
    """A cluster for one run.

    Args:
        run: what is to be run.
        timeouts: derived from it.
        profile: how long things take.
        chance: every draw comes from it.
        faults: planned ones.
        jitter: by which share times differ between nodes; 0 for not at all, and for speed.
        flaws: what is wrong with the job itself; default nothing.
        look_every_s: seconds between two looks while nothing is amiss; default once a beat.
        replay_every: steps between two in which ranks compute each other's last micro-batches once
            more; default they never do.

    Attributes:
        cluster: the machines.
        team: the ranks of the newest generation; None before the first.
        controller_killed: whether a fault has killed the controller, which whoever drives it does.
        corruption: which nodes compute wrong numbers, and which states came of that.
        devices: what nodes are made of, and what is on record about that.
    """

    def __init__(  # noqa: PLR0913 - each is one knob of an experiment
        self,
        run: TrainingRun,
        timeouts: Timeouts,
        profile: Profile,
        *,
        chance: np.random.Generator,
        faults: Sequence[ArmedFault] = (),
        jitter: float = 0.0,
        flaws: Flaws | None = None,
        look_every_s: float = 0.0,
        replay_every: int = 0,
    ) -> None:
        nodes = run.spec.nodes
        names = [NodeId(f"node-{i}") for i in range(nodes.count + nodes.spares)]
        store = SimStore(run.spec.checkpoint, cut_of(run))
        self.cluster = Cluster(names, store, timeouts, profile, chance=chance, jitter=jitter)
        self.cluster.before = self._tell
        self.cluster.disturbed = self._enter_all
        self.cluster.connected = self._remind
        self.cluster.lost = self._lose
        self._run, self._timeouts, self._profile = run, timeouts, profile
        self._flaws = flaws or Flaws()
        self.team: Team | None = None
        self._saving: Saving | None = None
        self._orders = Orders(run)
        self._wakes: list[Seconds] = []
        self._looks = Looks(self.cluster, timeouts, look_every_s, run)
        self._telling = Telling(self.cluster, self._looks, run, profile, replay_every)
        self._over = False
        self._requests: list[_Request] = []
        self.controller_killed = False
        self.layout = run.layout
        self.breaking = Breaking(self, faults)
        self.corruption = Corruption(self.cluster)
        self.devices = SimLedger(self.cluster)
        self.cluster.connect_all()

    @property
    def now(self) -> Seconds:
        """The run's clock."""
        return self.cluster.now

    @property
    def _generation(self) -> Generation:
        started = self._orders.started
        return started.generation if started else Generation(0)

    # The world ------------------------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        """Yield what happens, until the run has ended."""
        agenda, out = self.cluster.agenda, self.cluster.out
        while not self._over:
            if out:
                yield out.popleft()
                continue
            wake_at = self._wakes[0] if self._wakes else NEVER
            look_at = Seconds(max(min(self._looks.next_at(self.team), wake_at), self.now))
            if agenda.next_at <= look_at:
                self._await(agenda.next_at)
                agenda.perform()
                continue
            agenda.advance(look_at)
            while self._wakes and self._wakes[0] <= look_at:
                heapq.heappop(self._wakes)
            self._look()

    def _await(self, moment: Seconds) -> None:
        """Let time pass until something happens, and look before it does, after a quiet while."""
        self.cluster.agenda.advance(moment)
        if self._looks.unseen_s() > 0:
            self._look()

    def carry_out(self, decision: Decision) -> None:  # noqa: C901, PLR0912 - one case per decision
        """Carry out a decision; what comes of it comes back as an event."""
        cluster = self.cluster
        match decision:
            case StartGeneration():
                self._start(decision)
            case CatchUp(node=node):
                self._catch_up(cluster.nodes[node])
            case AnnounceRendezvous(generation=generation):
                members = self.team.members if self.team else ()
                cluster.send(members, partial(self._announce, generation=generation))
            case FenceNode(generation=generation, node=node):
                fence = partial(self._fence, generation=generation)
                cluster.send([cluster.nodes[node]], fence)
            case DisconnectNode(node=node):
                cluster.cut(cluster.nodes[node], told=False)
            case RetainMemory(generation=generation, step=step):
                self._order_retain(generation, step)
            case SetCadence(generation=generation, node=node, cadence=cadence):
                change = partial(self._save_every, generation=generation, cadence=cadence)
                cluster.send([cluster.nodes[node]], change)
            case SearchCheckpoints():
                cluster.later(self._profile.search, partial(self._search, decision))
            case CommitCheckpoint():
                cluster.later(self._profile.commit, partial(self._commit, decision))
            case AbandonCheckpoint():
                pass
            case JudgeCheckpoint():
                # Nobody waits for it, so nothing is drawn: a run comes out the same without.
                cluster.agenda.after(self._profile.commit.value, partial(self._judge, decision))
            case CarryOutFault(index=index, node=node):
                cluster.later(self._profile.order, partial(self.breaking.carry_out, index, node))
            case ProbeRanks():
                cluster.agenda.after(decision.within_s, partial(self._probe, decision))
            case InspectRanks():
                cluster.later(
                    self._profile.order, lambda: where_they_stand(cluster, self.team, decision)
                )
            case JudgeDevice():
                cluster.later(self._profile.commit, partial(self.devices.judge, decision))
            case PreflightDevices():
                self.devices.preflight(decision)
            case EndRun():
                self._over = True
            case WakeAt(at=at):
                heapq.heappush(self._wakes, at)

    def stop(self, by: str) -> None:
        """Ask for the run to be stopped."""
        self.cluster.emit(StopRequested(at=self.now, by=by))

    def drain(
        self, nodes: Sequence[NodeId], by: str, reason: str = "", within_s: float | None = None
    ) -> None:
        """Ask for nodes to be free, within so many seconds if they will be taken then."""
        asked = DrainRequested(
            at=self.now, nodes=tuple(nodes), by=by, reason=reason, within_s=within_s
        )
        self._ask(asked)

    def uncordon(self, nodes: Sequence[NodeId], by: str) -> None:
        """Say that nodes may be used again."""
        self._ask(DrainCancelled(at=self.now, nodes=tuple(nodes), by=by))

    def _ask(self, request: _Request) -> None:
        if isinstance(request, DrainRequested):
            self._looks.to_be_free.update(request.nodes)
        else:
            self._looks.to_be_free.difference_update(request.nodes)
        self._requests.append(request)
        self.cluster.emit(request)

    def look_at(self, moment: Seconds) -> None:
        """Have the controller told at a moment how things are, however quiet it is."""
        self.cluster.agenda.at(moment, self._look)

    def outlive_controller(self, seconds: float) -> None:
        """Go on without a controller for a while; whatever it did not know yet, it never will."""
        self.controller_killed = False
        self._wakes.clear()
        self.cluster.disconnect_all()
        agenda = self.cluster.agenda
        back_at = Seconds(self.now + seconds)
        while agenda.next_at <= back_at:
            agenda.perform()
        agenda.advance(back_at)
        self.settle()
        # Until somebody listens again, nobody watches.
        self._looks.told_at = back_at

    def resume(self, state: RunState, entries: Sequence[Entry]) -> None:
        """Have another controller be listened to, which knows what a journal says."""
        self.cluster.listening = True
        self._orders.resume(state, entries)
        self._telling.reported = state.reached_step
        self.breaking.resume(entries)
        # A request stands until it is on record.
        heard = [entry.event for entry in entries if isinstance(entry.event, _Request)]
        self._requests = [request for request in self._requests if request not in heard]
        for request in self._requests:
            self.cluster.emit(request)
        self.corruption.resume(entries)
        self.devices.tell()
        self.cluster.connect_all()

    # Looking --------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring what trained meanwhile up to now."""
        team, saving = self.team, self._saving
        if team is None or saving is None or team.pace is None:
            return
        done = team.pace.done(self.now)
        saving.settle(done)
        if done < team.pace.last or team.finished or not team.whole:
            return
        # Ranks wait for their last state to be durable, but not for ever.
        waited_s = self.now - team.pace.moment(team.pace.last)
        if saving.last_written or waited_s > self._timeouts.persist_s:
            self._finish(team)

    def _finish(self, team: Team) -> None:
        """All steps are done: say so, with what each rank's part of the state digest is."""
        last, layout = Step(self._run.spec.trainer.steps), self._run.layout
        team.finish()
        for node in team.members:
            # Replicas say the same, as they should.
            node.lanes = tuple((last, layout.shard_of(rank)) for rank in node.ranks)
            fact = RanksFinished(
                generation=team.generation, step=last, ranks=node.ranks, lanes=node.lanes
            )
            self.cluster.say([node], fact)

    def _look(self) -> None:
        self.settle()
        self._looks.looked()
        self._telling.tell(self.team, always=True)
        self.breaking.look()

    def _tell(self) -> None:
        self._telling.tell(self.team)

    def _enter_all(self) -> None:
        """Enter what all nodes hold alike, before one of them is another than the others."""
        if self._saving is not None:
            self._saving.alike.enter()

    # Orders ---------------------------------------------------------------------------------------

    def _start(self, decision: StartGeneration) -> None:
        if decision.generation > self._generation:
            self._orders.start(decision)
        if self.team is None or decision.generation > self.team.generation:
            self.settle()
            self._enter_all()
            order = self._orders.begin("", {})
            steps = self._run.spec.trainer.steps
            self.team = Team(self.cluster, order, steps, self._foresee, self._flaws)
            self._looks.begin()
            self._telling.cadence = order.cadence or self._run.cadence
            self._saving = Saving(self.cluster, self.team, self._run, self._telling.cadence)
            self._telling.reported = self.team.start
            self.corruption.began(self.team, order.ancestors or ())
            self.change_speed()
        self.cluster.send(self.team.members, self.team.begin)

    def _catch_up(self, node: SimNode) -> None:
        """Have a node begin that is behind; all, if a dead controller told none of them."""
        started, team = self._orders.started, self.team
        assert started is not None, "nobody is behind a generation that was never ordered"
        if team is None or team.generation < started.generation:
            self._start(started)
        else:
            self.cluster.send([node], team.begin)

    def _remind(self, node: SimNode) -> None:
        """Send again what an earlier connection, or an earlier controller, may have lost."""
        for index in self.breaking.owed(node.id):
            owed = partial(self.breaking.carry_out, index, node.id)
            self.cluster.later(self._profile.order, owed)
        team = self.team
        if team is not None and node.generation == team.generation and node in team.members:
            self.cluster.send([node], team.begin)

    def _probe(self, order: ProbeRanks) -> None:
        """Have ranks say how fast they are, and look when one that is slow may be swapped."""
        team = self.team
        if team is None or team.generation != order.generation or not team.whole:
            return
        how_fast_they_are(self.cluster, order)
        suspect = self.cluster.nodes[order.nodes[0]]
        usual = min(node.slow for node in team.members)
        if suspect.slow > usual and self._swaps_slow:
            pays_after_s = self._restart_s() / (1 - usual / suspect.slow)
            at = Seconds(self.now + WAITS_TIMES * pays_after_s)
            self._looks.slow[suspect.id] = at, Seconds(self.now + WAITED_TIMES * pays_after_s)

    def _restart_s(self) -> float:
        p = self._profile
        parts = (p.order, p.stop, p.seat, p.rendezvous, p.load, p.first_step)
        return sum(part.value for part in parts)

    @property
    def _swaps_slow(self) -> bool:
        """Whether a node that was measured to be slow is waited for to be swapped."""
        return {PLANNED_SWAP, STRAGGLER_SWAP}.isdisjoint(self._run.spec.recovery.disable)

    def _announce(self, nodes: Nodes, *, generation: Generation) -> None:
        if self.team is not None and self.team.generation == generation:
            self.team.announce(nodes)

    def _fence(self, nodes: Nodes, *, generation: Generation) -> None:
        for node in nodes:
            if node.generation < generation:
                order = self._orders.fence("", generation)
                lineage = Lineage(generation, order.restore, Step(-1), order.ancestors)
                node.begin((), Judge(lineage))

    def _save_every(self, _: Nodes, *, generation: Generation, cadence: Cadence) -> None:
        team, saving = self.team, self._saving
        if saving is None or team is None or team.generation != generation:
            return
        # What was done until now was saved as often as was said before.
        self.settle()
        self._tell()
        self._telling.cadence = saving.cadence = cadence
        self.change_speed()

    def _order_retain(self, generation: Generation, step: Step) -> None:
        saving = self._saving
        if saving is not None and saving.alike.possible:
            saving.alike.retain(generation, step)
            return
        retain = partial(self._retain, generation=generation, step=step)
        self.cluster.send(list(self.cluster.nodes.values()), retain)

    def _retain(self, nodes: Nodes, *, generation: Generation, step: Step) -> None:
        for node in nodes:
            if node.generation <= generation:
                node.retain(step)

    def _judge(self, order: JudgeCheckpoint) -> None:
        self.cluster.store.judge(order)
        judged = CheckpointJudged(
            at=self.now,
            step=order.step,
            epoch=order.epoch,
            verdict=order.verdict,
            reason=order.reason,
        )
        self.cluster.emit(judged)

    def _commit(self, order: CommitCheckpoint) -> None:
        self.cluster.emit(self.cluster.store.commit(order, self._generation, self.now))

    def _search(self, order: SearchCheckpoints) -> None:
        found = self.cluster.store.search(
            order.number, self.now, order.onsets, graded=order.graded is True
        )
        self.cluster.emit(found)

    # What holds it up -----------------------------------------------------------------------------

    def _lose(self, node: SimNode) -> None:
        self.settle()
        if self.team is not None:
            self.team.lose(node)

    def change_speed(self) -> None:
        """Have the team go as fast as its slowest node, and count what its saves cost."""
        if self.team is None:
            return
        slows = [node.slow for node in self.team.members]
        slow, usual = max(slows), min(slows)
        done, of = self._run.speed(len(self.team.seats) // self._run.shard_count)
        step_s = slow * self._profile.step.value * of / done
        self._telling.step_s = step_s + self._profile.stall.value / self._telling.cadence.memory
        own_s = step_s / slow
        compute_s: tuple[float, ...] = (own_s * slow,)
        if slow > usual:
            compute_s = tuple((own_s * np.array(slows)[self.team.place_R]).tolist())
        still = {n: at for n, at in self._looks.slow.items() if self.cluster.nodes[n].slow > usual}
        self._looks.slow = still
        self._telling.compute_s = compute_s
        self.team.set_speed(self._telling.step_s)

    def _foresee(self, team: Team) -> None:
        """Look exactly when steps are done that something waits for."""
        if team is not self.team or team.pace is None:
            return
        # Steps that are done are soon known; whoever is slower than others is found within some.
        self._looks.look_soon()
        if len(self._telling.compute_s) > 1:
            self._looks.look_closely(FOUND_STEPS * self._telling.step_s)
        self.breaking.foresee(team)
        if team.raises_at is not None and team.raises_at > team.pace.done(self.now):
            moment = team.pace.moment(team.raises_at)
            if moment < NEVER:
                # Just before it is done: it never is.
                self.cluster.agenda.at(Seconds(moment - _BEFORE_S), partial(self._fail, team))

    def _fail(self, team: Team) -> None:
        self.settle()
        if team is self.team and team.whole:
            team.fail()
