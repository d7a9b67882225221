"""A world of the trainer's ranks, forked, killed and seated again by a small agent: this file."""

import contextlib
import math
import os
import select
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from orchestrator.agent.process import RankProcess
from orchestrator.agent.warm import Warm
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import (
    BEACON_VARIABLE,
    CONTROL_FD_VARIABLE,
    MEMORY_VARIABLE,
    Abort,
    Died,
    Finished,
    Framer,
    FromRank,
    Offer,
    Persisted,
    Reached,
    Rendezvous,
    Restore,
    Seat,
    SlotFreed,
    Staged,
    ToRank,
    Troubled,
    frame,
    read_from_rank,
)
from orchestrator.protocol.runfile import Parallelism
from orchestrator.worker import EXIT_STUCK
from orchestrator.worker.beacon import BeaconReader, create
from storage.digest import combine

Result = tuple[tuple[int, int], list[tuple[int, float]]]
"""Digest of the final state, and the loss of every step."""
SLOTS = (0, 1, 2)
# 49 rows do not divide by two: the shards of some weights are of different size, and padded.
SIZES = {"dim": 32, "layers": 2, "heads": 2, "kvHeads": 1, "ffnDim": 49, "vocab": 1280}
JOB: dict[str, Any] = {
    "trainer": {"model": SIZES, "steps": 24, "seqLen": 32, "globalBatch": 4},
    "parallelism": {"dpReplicate": 2, "dpShard": 2},
    "checkpoint": {"everySteps": 10, "memoryEverySteps": 3},
}


class Copy(NamedTuple):
    """A shard in memory, and which rank wrote it; another one may begin from it."""

    staged: Staged
    owner: int


class Member:
    """One rank's process, seen from its agent."""

    def __init__(self, warm: Warm, memory: Path, number: int, worlds_max: int) -> None:
        beacon = memory / f"beacon-{number}"
        create(beacon)
        self.control, theirs = socket.socketpair()
        environment = {
            BEACON_VARIABLE: str(beacon),
            MEMORY_VARIABLE: str(memory),
            "WORLDS_MAX": str(worlds_max),
        }
        with theirs:
            pid = warm.fork(environment, theirs, CONTROL_FD_VARIABLE, memory / "ranks.log")
        self.process = RankProcess(pid)
        self.beacon = BeaconReader(beacon)
        self.framer = Framer()
        self.seat: Seat | None = None
        self.marks: set[tuple[int, str]] = set()
        self.finished: Finished | None = None

    def send(self, message: ToRank) -> None:
        with contextlib.suppress(OSError):  # it is gone; its process descriptor says so too
            self.control.sendall(frame(message))

    @property
    def parked(self) -> bool:
        return self.seat is None and self.beacon.read().phase is RankPhase.WAITING

    def close(self) -> None:
        if self.process.code is None:
            self.process.stop(0.0, 10)
        self.control.close()
        self.beacon.close()


class World:
    """Ranks on one node, with one parked process more than ranks."""

    def __init__(
        self, warm: Warm, memory: Path, worlds_max: int = 32, job: dict[str, Any] = JOB
    ) -> None:
        self.warm, self.memory, self.worlds_max, self.job = warm, memory, worlds_max, job
        layout = msgspec.convert(job["parallelism"], Parallelism).layout(0)
        self.shards, self.size = layout.shard_count, layout.world_size
        self.members: list[Member] = []
        self.ranks: dict[int, Member] = {}
        self.generation = 0
        self.address = ""
        self.staged: dict[int, dict[int, Copy]] = {rank: {} for rank in range(self.size)}
        """Of every rank's shard, by step."""
        self.saves: dict[int, set[int]] = {}
        """Ranks that staged, by step."""
        self.without_slots: set[int] = set()
        """Ranks whose seats name no free slot."""
        self.losses: dict[int, float] = {}
        self.troubled = 0
        self.stuck = 0
        self.restored_from: list[int] = []
        self.began = 0.0

    def park(self, count: int) -> None:
        for _ in range(count):
            self.members.append(self._fork())
        self.until(lambda: sum(m.parked for m in self.members) >= count)

    def begin(self, replicas: int | None = None) -> None:
        """Abort what is left of the old world, wait until it is gone, and seat a new one.

        Args:
            replicas: of the new one; default as many as before.
        """
        self.generation += 1
        self.address = ""
        held = [m for m in self.ranks.values() if m.process.code is None]
        for member in held:
            member.send(Abort(before=Generation(self.generation)))
        self.until(lambda: all(self._left(m) for m in held))
        if replicas is not None:
            self._resize(self.shards * replicas)
        for rank in range(self.size):
            member = self.ranks.get(rank)
            if member is None or member.process.code is not None:
                self.stuck += member is not None and member.process.code == EXIT_STUCK
                self.ranks[rank] = self._standby()
            self._seat(rank)

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.ranks[rank].process.pid, number)
        if number == signal.SIGKILL:
            self.until(lambda: self.ranks[rank].process.wait(0) is not None)

    def until(self, condition: Callable[[], bool], within_s: float = 30.0) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, (self.memory / "ranks.log").read_text()[-4000:]
            controls = {m.control: m for m in self.members if m.process.code is None}
            for control in select.select(list(controls), [], [], 0.005)[0]:
                self._hear(controls[control])

    def step(self) -> int:
        return max(m.beacon.read().step for m in self.ranks.values())

    def still(self) -> bool:
        """Whether no rank has shown a sign of life for a while."""
        looks = [m.beacon.read().moved_ns for m in self.ranks.values()]
        return time.monotonic_ns() - max(looks) > 200_000_000

    def reached(self, mark: str) -> bool:
        return all((self.generation, mark) in m.marks for m in self.ranks.values())

    def finished(self) -> bool:
        return all(
            m.finished is not None and m.finished.generation == self.generation
            for m in self.ranks.values()
        )

    def result(self, *, within: float = 0.0) -> Result:
        """Return what the run came to.

        Args:
            within: relative difference between losses of one step; 0 for none.
        """
        for member in self.members:
            for record in member.beacon.new_steps():
                # A step that was taken again, or by another rank, has the same bits.
                loss = self.losses.setdefault(record.step, record.loss)
                assert math.isclose(loss, record.loss, rel_tol=within)
        lanes = [m.finished.lanes for m in self.ranks.values() if m.finished is not None]
        return combine(lanes), sorted(self.losses.items())

    def close(self) -> None:
        for member in self.members:
            member.close()

    def _resize(self, size: int) -> None:
        """Have ranks that are too many stand by, and new ones begin from shards of others."""
        for rank in [rank for rank in self.ranks if rank >= size]:
            self.ranks.pop(rank).seat = None
        newest = max(set.intersection(*(set(steps) for steps in self.staged.values())))
        self.staged = {
            rank: {newest: self.staged[rank if rank < self.size else rank % self.shards][newest]}
            for rank in range(size)
        }
        self.size = size

    def _left(self, member: Member) -> bool:
        assert member.seat is not None
        left = (member.seat.generation, "left") in member.marks
        return member.process.wait(0) is not None or left

    def _fork(self) -> Member:
        return Member(self.warm, self.memory, len(self.members), self.worlds_max)

    def _standby(self) -> Member:
        waiting = [m for m in self.members if m.seat is None and m.process.code is None]
        if not waiting:
            self.members.append(self._fork())
            return self.members[-1]
        return waiting[0]

    def _seat(self, rank: int) -> None:
        common = set.intersection(*(set(steps) for steps in self.staged.values()))
        restore = None
        if common:
            newest, owner = self.staged[rank][max(common)]
            path = self.memory / f"rank-{owner:05d}.slot-{newest.slot}"
            restore = Restore(step=newest.step, path=str(path), index=newest.index)
            self.staged[rank] = {newest.step: Copy(newest, owner)}
        self.restored_from.append(max(common, default=0))
        taken = {copy.staged.slot for copy in self.staged[rank].values() if copy.owner == rank}
        member = self.ranks[rank]
        member.seat = Seat(
            generation=Generation(self.generation),
            rank=Rank(rank),
            world_size=self.size,
            local_rank=rank,
            node=NodeId("node-0"),
            run_id="run",
            job=self.job,
            restore=restore,
            free_slots=()
            if rank in self.without_slots
            else tuple(s for s in SLOTS if s not in taken),
            cache_dir=str(self.memory),
        )
        member.send(member.seat)

    def _hear(self, member: Member) -> None:
        try:
            data = member.control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            member.process.wait(10)
            return
        for body in member.framer.feed(data):
            self._take(member, read_from_rank(body))

    def _take(self, member: Member, message: FromRank) -> None:
        match message:
            case Offer(generation=generation, address=address):
                for other in self.ranks.values():
                    other.send(Rendezvous(generation=generation, address=address))
            case Reached(generation=generation, mark=mark):
                member.marks.add((generation, mark))
            case Staged():
                self._keep(member, message)
            case Troubled():
                self.troubled += 1
            case Finished():
                member.finished = message
            case Died():
                raise AssertionError(message.traceback)

    def _keep(self, member: Member, message: Staged) -> None:
        assert member.seat is not None
        if message.generation != self.generation:
            return
        held = self.staged[member.seat.rank]
        held[message.step] = Copy(message, member.seat.rank)
        self.saves.setdefault(message.step, set()).add(member.seat.rank)
        if message.durable:
            member.send(Persisted(step=message.step))
        for rank, steps in self.staged.items():
            safe = max(set.intersection(*(set(s) for s in self.staged.values())), default=Step(0))
            for step in [s for s in steps if s < safe]:
                copy = steps.pop(step)
                if copy.owner == rank:
                    self.ranks[rank].send(SlotFreed(slot=copy.staged.slot))


@contextlib.contextmanager
def a_world(
    warm: Warm,
    *,
    parked: int,
    worlds_max: int = 32,
    without_slots: tuple[int, ...] = (),
    job: dict[str, Any] = JOB,
) -> Iterator[World]:
    # In memory, as an agent's.
    with tempfile.TemporaryDirectory(prefix="holdfast-test-", dir="/dev/shm") as memory:
        world = World(warm, Path(memory), worlds_max, job)
        try:
            world.park(parked)
            world.without_slots.update(without_slots)
            world.begin()
            yield world
        finally:
            world.close()


def left_alone(warm: Warm, job: dict[str, Any] = JOB) -> Result:
    """Return what a run comes to in which nothing happens."""
    layout = msgspec.convert(job["parallelism"], Parallelism).layout(0)
    with a_world(warm, parked=layout.world_size, job=job) as world:
        world.until(world.finished)
        return world.result()
