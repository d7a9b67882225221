"""What becomes of the states that a team stages: held here, copied to buddies, made durable."""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import NamedTuple

from orchestrator.core.events import CopiesHeld, Together
from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.ids import NodeId, Seconds, Step
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import Receipt, ShardsHeld, ShardsWritten, WriteFailed
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.simulated.alike import Alike
from orchestrator.worlds.simulated.cluster import TOGETHER_MIN, Cluster
from orchestrator.worlds.simulated.node import SAVES_MAX, Save, SimNode
from orchestrator.worlds.simulated.store import OUTAGE
from orchestrator.worlds.simulated.team import Team

MODEL = "simulated"


class _Pending(NamedTuple):
    at: Seconds
    save: Save


@lru_cache(maxsize=1)
def _receipts(shards: int) -> tuple[Receipt, ...]:
    return tuple(Receipt(shard=rank, size=1, index_digest="0" * 32) for rank in range(shards))


@lru_cache(maxsize=1)
def _written(layout: Layout) -> dict[int, int]:
    """Return the shard of each rank that writes one."""
    return {rank: shard for shard, rank in enumerate(layout.ranks_of(replica=0))}


class Saving:
    """The saves of one team.

    Attributes:
        alike: what all of its nodes hold alike.
        cadence: how often it saves from now on.
        last_written: whether the last step of the run is durable, as far as ranks know.

    Args:
        cluster: the machines.
        team: whose.
        run: into how many shards it saves.
        cadence: how often, in the beginning.
    """

    def __init__(self, cluster: Cluster, team: Team, run: TrainingRun, cadence: Cadence) -> None:
        self._cluster, self._team = cluster, team
        self.cadence = cadence
        self._steps = run.spec.trainer.steps
        self._shard_of = _written(run.layout)
        self._writers = [
            n for n in team.members if not self._shard_of.keys().isdisjoint(team.ranks[n.id])
        ]
        self._receipts = _receipts(run.shard_count)
        self._seen = team.start
        self._owes_last = True
        self.last_written = False
        self.alike = Alike(cluster, team)
        self._copies: list[_Pending] = []
        self._newest: deque[Save] = deque(maxlen=SAVES_MAX)
        """What was staged last; older ones have given their place to them everywhere."""
        self._writes: list[_Pending] = []

    def settle(self, done: Step) -> None:
        """Enter whatever has come about since the last call; `done` steps are complete."""
        pace, now = self._team.pace, self._cluster.agenda.now
        if pace is None:
            return
        # Of many that nobody looked at, only the last ones are still anywhere.
        for step in self._due(self.cadence.memory, done)[-SAVES_MAX:]:
            self._stage(step, min(pace.moment(step), now))
        for step in self._due(self.cadence.durable, done)[-1:]:
            self._queue_write(step, min(pace.moment(step), now))
        self._seen = Step(max(self._seen, done))
        self._owes_last = self._owes_last and done < self._steps
        self._copy(now)
        self._write(now)

    def _queue_write(self, step: Step, at: Seconds) -> None:
        """Have a state become durable: one at a time has all of the tier's bandwidth.

        Of those that wait for it only the newest is still in memory when its turn comes.
        """
        save = Save(step, self._team.generation)
        before = [pending for pending in self._writes if pending.at > at]
        if len(before) > 1:
            self._writes[self._writes.index(before[-1])] = _Pending(before[-1].at, save)
            return
        begins = max((at, *(pending.at for pending in before)))
        write_s = self._cluster.lasts(self._cluster.profile.write) + self._cluster.store.delay_s
        self._writes.append(_Pending(Seconds(begins + write_s), save))

    def _due(self, every: int, done: Step) -> list[Step]:
        first = (self._seen // every + 1) * every
        steps = [Step(step) for step in range(first, done + 1, every)]
        # The last step is saved in every way, whatever it is a multiple of, and also by ranks that
        # were restored behind it.
        if done >= self._steps and self._owes_last and self._steps not in steps:
            steps.append(Step(self._steps))
        return steps

    def _present(self) -> list[SimNode]:
        team = self._team
        return [n for n in team.members if n.alive and n.generation == team.generation]

    def _stage(self, step: Step, at: Seconds) -> None:
        if self._cluster.forgetful:
            return
        save = Save(step, self._team.generation)
        self._newest.append(save)
        copied_at = Seconds(at + self._cluster.lasts(self._cluster.profile.copy))
        self._copies.append(_Pending(copied_at, save))
        if self.alike.possible:
            self.alike.stage(save)
            if copied_at > self._cluster.now:
                self._tell_together(save, copied=False)
            return
        nodes = self._present()
        for node in nodes:
            node.put(save, node.ranks)
        if self._many:
            self._tell_together(save, copied=False, missing=self._missing(save))
        else:
            self._tell(nodes)

    def _copy(self, now: Seconds) -> None:
        for pending in [p for p in self._copies if p.at <= now]:
            self._copies.remove(pending)
            if self.alike.possible and self.alike.copy(pending.save):
                self._tell_together(pending.save, copied=True)
                continue
            displaced = pending.save not in self._newest
            if self._many and (displaced or not self._anywhere(pending.save)):
                # Nobody looked for so long that newer ones have taken its place everywhere.
                names = tuple(self._team.ranks)
                self._tell_together(pending.save, copied=True, missing=names, uncopied=names)
                continue
            takers = {node.id: self._sent(node, pending.save) for node in self._team.members}
            if self._many:
                uncopied = tuple(name for name, taker in takers.items() if taker is None)
                missing = self._missing(pending.save)
                self._tell_together(pending.save, copied=True, missing=missing, uncopied=uncopied)
            else:
                self._tell([taker for taker in takers.values() if taker is not None])

    def _anywhere(self, save: Save) -> bool:
        return any(save in node.shelf for node in self._team.members)

    def _sent(self, node: SimNode, save: Save) -> SimNode | None:
        """Copy a save of a node to its buddy; return that, or None if it does not get there."""
        buddy = self._cluster.nodes.get(self._team.buddy_of(node.id) or node.id)
        if buddy is None or buddy is node or not (node.reachable and buddy.reachable):
            return None
        # A spare that keeps copies is of no generation, or of an older one.
        there = node.alive and node.generation == self._team.generation and save in node.shelf
        return buddy if there and buddy.alive and buddy.put(save, node.ranks) else None

    @property
    def _many(self) -> bool:
        """Whether nodes speak together; each has a buddy among them, for they are more than one."""
        return len(self._team.members) >= TOGETHER_MIN

    def _missing(self, save: Save) -> tuple[NodeId, ...]:
        """Return the nodes that do not say that they hold a save."""
        return tuple(n.id for n in self._team.members if not (n.heard and save in n.shelf))

    def _tell_together(
        self,
        save: Save,
        *,
        copied: bool,
        missing: tuple[NodeId, ...] = (),
        uncopied: tuple[NodeId, ...] = (),
    ) -> None:
        held = CopiesHeld(
            at=self._cluster.now,
            generation=save.generation,
            step=save.step,
            copied=copied,
            missing=missing,
            uncopied=uncopied,
        )
        self._cluster.emit(held)

    def _tell(self, nodes: list[SimNode]) -> None:
        """Each says what it holds."""
        for node in nodes:
            fact = ShardsHeld(generation=self._team.generation, holdings=node.holdings())
            self._cluster.say([node], fact)

    def _write(self, now: Seconds) -> None:
        for pending in [p for p in self._writes if p.at <= now]:
            self._writes.remove(pending)
            step = pending.save.step
            if self._cluster.store.down or self._cluster.store.full:
                why = OUTAGE if self._cluster.store.down else "no space left on device"
                failed = WriteFailed(generation=self._team.generation, step=step, reason=why)
                self._cluster.say(self._present()[:1], failed)
                retry = self._cluster.lasts(self._cluster.profile.write)
                self._writes.append(_Pending(Seconds(now + retry), pending.save))
                continue
            self._cluster.store.wrote(self._team.generation)
            self.last_written = self.last_written or step == self._steps
            self._say_written(step)

    def _say_written(self, step: Step) -> None:
        """Have every node that owes shards say that they are durable."""
        if self.alike.possible and len(self._writers) >= TOGETHER_MIN:
            fact = ShardsWritten(
                generation=self._team.generation, step=step, receipts=self._receipts, model=MODEL
            )
            names = tuple(node.id for node in self._writers)
            self._cluster.emit(Together(at=self._cluster.now, nodes=names, fact=fact))
            return
        for node in self._writers:
            if node.alive and node.generation == self._team.generation:
                shards = [self._shard_of[rank] for rank in node.ranks if rank in self._shard_of]
                receipts = tuple(self._receipts[shard] for shard in shards)
                fact = ShardsWritten(
                    generation=self._team.generation, step=step, receipts=receipts, model=MODEL
                )
                self._cluster.say([node], fact)
