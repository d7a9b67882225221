"""Plays many agents in one process: real connections and a real account each, ranks in name only.

    python -m tests.programs.crowd < SHARE

The first line of standard input is a `Share`; every line after it is a question, and is answered by
a line: `status` by a `Status`, `seats` by `dict[NodeId, Seated]`, and `exit RANK` by when the agent
of that rank said that its process was killed. The end of standard input ends the process.

An agent here is the agent's own `Channel` (token, WebSocket, backing off, coming back) and
`Account` (what is said again on a new connection). It takes up every generation at once, reports
every mark, beats as often as it is told, and holds what its ranks and those of its neighbour
stage. All moments are CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable

import msgspec

from orchestrator.agent.account import CLEARED, SEATED, STEPPED, Account
from orchestrator.agent.channel import Channel
from orchestrator.protocol.agent import AgentConfig
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import (
    MARKS,
    PROTOCOL_VERSION,
    Announce,
    Beat,
    Begin,
    Fact,
    Farewell,
    Fence,
    Holding,
    Joined,
    Prepared,
    RankExited,
    RendezvousOffered,
    Retain,
    ShardsHeld,
    StepReport,
    ToAgent,
    Welcome,
)
from orchestrator.protocol.phases import RankPhase

SHARE_MAX_BYTES = 1 << 22
SAVES_KEPT = 2
"""Saves of which an agent holds the shards."""


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """Which agents a process plays, and how."""

    run: str
    token: str
    controller_file: str
    first: int
    """Number of its first node; they are called as `holdfast run` calls them."""
    nodes: int
    step_s: float
    """A step takes so long, on every rank at the same time."""
    save_every: int
    """Steps between two saves to memory."""


class Seated(msgspec.Struct, frozen=True):
    """Where an agent stands."""

    generation: Generation
    ranks: tuple[Rank, ...]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Where the agents of a process stand, all together."""

    connected: int
    connected_at: float
    """When the newest of those connections was welcomed."""
    generation: Generation
    """The newest that any agent has heard of."""
    begun: int
    """How many have taken it up, or know that they are no part of it."""
    begun_at: float
    """When the last of them heard of it."""
    training: int
    """How many do steps in it."""
    cpu_s: float
    """Processor time of this process so far."""


class CrowdAgent:
    """One agent.

    Args:
        share: of whom it is one.
        number: which.
    """

    def __init__(self, share: Share, number: int) -> None:
        self._share = share
        self.node = NodeId(f"node-{number}")
        self.account = Account()
        self.begun_at = self.connected_at = 0.0
        self._beat_s = 1.0
        self._trains_from: tuple[float, Step] | None = None
        self._saved = Step(0)
        self._buddys: tuple[Rank, ...] = ()
        self._holdings: tuple[Holding, ...] = ()
        self._told_held: tuple[Holding, ...] = ()
        self.channel = Channel(
            AgentConfig(
                node=self.node,
                incarnation=1,
                run=share.run,
                token=share.token,
                controller_file=share.controller_file,
                entrypoint="",
                ranks=0,
                memory="",
                work="",
                logs="",
            ),
            joined=self._joined,
            welcomed=self._welcomed,
            obey=self._obey,
        )

    async def live(self) -> None:
        """Call the controller, for ever."""
        await self.channel.run()

    async def beat(self, offset: float) -> None:
        """Beat as often as told, for ever; `offset` in [0, 1) says when within a beat."""
        await asyncio.sleep(offset * self._beat_s)
        due = time.monotonic()
        while True:
            self._train()
            if self.channel.connected:
                self.channel.send(self._beat())
            due = max(due + self._beat_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    def lose(self, rank: Rank) -> float:
        """Say that a rank was killed; return when that was."""
        self._train()
        self.channel.send(self._beat())
        at = time.monotonic()
        self._say(
            RankExited(
                generation=self.account.generation,
                rank=rank,
                pid=int(rank) + 1,
                code=-signal.SIGKILL,
                phase=RankPhase.FORWARD,
                step=self._done(),
            )
        )
        return at

    # What it says -------------------------------------------------------------------------------

    def _joined(self) -> Joined:
        account = self.account
        self._told_held = account.vouched(self._holdings)
        return Joined(
            node=self.node,
            version=PROTOCOL_VERSION,
            incarnation=1,
            pid=os.getpid(),
            peer_address="127.0.0.1:9",
            generation=account.generation,
            mark=account.mark,
            ranks=account.ranks,
            holdings=self._told_held,
            offered=account.offered,
        )

    def _welcomed(self, terms: Welcome) -> None:
        self.connected_at = time.monotonic()
        self._beat_s = terms.timeouts.beat_s
        self.account.reconnected(terms.steps_known)
        self.channel.send(self._beat())
        if self._holdings != self._told_held:
            self._say_held()
        for fact in self.account.facts():
            self.channel.send(fact)

    def _beat(self) -> Beat:
        account, size = self.account, len(self.account.ranks)
        done = self._done()
        return Beat(
            generation=account.generation,
            ranks=account.ranks,
            phases=(int(RankPhase.FORWARD),) * size,
            steps=(int(done),) * size,
            progress=(int(time.monotonic() * 10),) * size,
            states="S" * size,
            cpu_s=(round(time.monotonic(), 2),) * size,
            stall_s=(0.05 * done,) * size,
            reports=account.unsent(),
        )

    def _say(self, fact: Fact) -> None:
        self.account.keep(fact)
        if self.account.owes_ahead_of(fact) and self.channel.connected:
            self.channel.send(self._beat())
        self.channel.send(fact)

    def _say_held(self) -> None:
        self._say(ShardsHeld(generation=self.account.generation, holdings=self._holdings))

    # What it does -------------------------------------------------------------------------------

    def _obey(self, order: ToAgent) -> None:
        match order:
            case Begin(generation=generation) if generation > self.account.generation:
                self._begin(order)
            case Fence(generation=generation) if generation > self.account.generation:
                self._enter(generation, ())
            case Announce(generation=generation) if generation == self.account.generation:
                self._form()
            case Retain(step=step):
                self.account.confirm(step)
            case Farewell():
                raise SystemExit(f"{self.node} was sent away: {order.reason}")
            case _:
                pass

    def _begin(self, order: Begin) -> None:
        ranks = order.ranks_of(self.node)
        restore = order.restore or Step(0)
        self._enter(order.generation, ranks)
        self._saved = restore
        self._holdings = tuple(h for h in self._holdings if h.step <= restore)
        # Not those of its buddy, whose ranks are not told here: as many as that has.
        self._buddys = tuple(Rank((r + len(ranks)) % order.world_size) for r in ranks)
        for mark in (CLEARED, SEATED):
            self._reach(mark)
        if order.restore is not None:
            self._say(
                Prepared(
                    generation=order.generation,
                    step=order.restore,
                    own=len(ranks),
                    fetched=0,
                    durable=0,
                    seconds=0.0,
                )
            )
        self._trains_from = (float("inf"), restore)
        if Rank(0) in ranks:
            self.account.offered = "127.0.0.1:9"
            self._say(RendezvousOffered(generation=order.generation, address="127.0.0.1:9"))

    def _enter(self, generation: Generation, ranks: tuple[Rank, ...]) -> None:
        self.begun_at = time.monotonic()
        self.account.begin(generation, ranks)
        self._trains_from = None

    def _form(self) -> None:
        """Process groups stand: all ranks come as far as their first step."""
        if self._trains_from is None or self.account.mark >= STEPPED:
            return
        self._trains_from = (time.monotonic(), self._trains_from[1])
        for mark in range(SEATED + 1, STEPPED + 1):
            self._reach(mark)

    def _reach(self, mark: int) -> None:
        fact = self.account.advance(mark)
        if fact is not None:
            self._say(fact)

    def _done(self) -> Step:
        """Return the steps that are done."""
        if self._trains_from is None:
            return Step(0)
        since, start = self._trains_from
        passed_s = max(time.monotonic() - since, 0.0)
        return Step(start + int(passed_s / self._share.step_s))

    def _train(self) -> None:
        """Take note of the steps that were done meanwhile, and of what they staged."""
        done, every = self._done(), self._share.save_every
        account = self.account
        if not account.ranks:
            return
        known = max(self._saved, done - 256)
        account.record(
            StepReport(Step(s), 1.0 / s, 1.0, 1 << 24, self._share.step_s)
            for s in range(known + 1, done + 1)
        )
        due = Step(done // every * every)
        if due > self._saved:
            self._saved = due
            steps = sorted({h.step for h in self._holdings} | {due})[-SAVES_KEPT:]
            held = sorted((*account.ranks, *self._buddys))
            self._holdings = tuple(Holding(rank, step) for step in steps for rank in held)
            self._say_held()


class Crowd:
    """The agents of one process."""

    def __init__(self, share: Share) -> None:
        self._agents = [CrowdAgent(share, share.first + n) for n in range(share.nodes)]

    async def live(self, asked: asyncio.StreamReader) -> None:
        """Live until nobody asks any more."""
        count = len(self._agents)
        tasks = [asyncio.create_task(agent.live()) for agent in self._agents]
        tasks += [asyncio.create_task(a.beat(n / count)) for n, a in enumerate(self._agents)]
        tasks.append(asyncio.create_task(self._answer(asked)))
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _answer(self, asked: asyncio.StreamReader) -> None:
        while question := (await asked.readline()).split():
            answers: dict[bytes, Callable[[], object]] = {
                b"status": self._status,
                b"seats": self._seats,
                b"exit": lambda: self._lose(Rank(int(question[1]))),
            }
            sys.stdout.buffer.write(msgspec.json.encode(answers[question[0]]()) + b"\n")
            sys.stdout.buffer.flush()

    def _status(self) -> Status:
        newest = max(agent.account.generation for agent in self._agents)
        begun = [a for a in self._agents if a.account.generation == newest]
        connected = [a for a in self._agents if a.channel.connected]
        return Status(
            connected=len(connected),
            connected_at=max((a.connected_at for a in connected), default=0.0),
            generation=newest,
            begun=len(begun),
            begun_at=max(a.begun_at for a in begun),
            training=sum(a.account.mark == MARKS.index("stepped") for a in begun),
            cpu_s=time.process_time(),
        )

    def _seats(self) -> dict[NodeId, Seated]:
        return {a.node: Seated(a.account.generation, a.account.ranks) for a in self._agents}

    def _lose(self, rank: Rank) -> float:
        (agent,) = [agent for agent in self._agents if rank in agent.account.ranks]
        return agent.lose(rank)


async def main() -> None:
    """Play the agents that standard input says."""
    loop = asyncio.get_running_loop()
    asked = asyncio.StreamReader(limit=SHARE_MAX_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)
    share = msgspec.json.decode(await asked.readline(), type=Share)
    await Crowd(share).live(asked)


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, format="crowd %(process)d: %(levelname)s %(message)s")
    asyncio.run(main())
