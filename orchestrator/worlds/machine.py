"""The machine of a local run: its nodes are agents, processes with memory of their own.

It is what a data centre does by itself: it starts agents, starts them again when they end, and
leaves lost nodes lost, unless a fault plan says that they come back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from orchestrator.agent import linux
from orchestrator.protocol.agent import LOST_FOR, NODE_LOST_EXIT, AgentConfig
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worlds import born
from orchestrator.worlds.folder import RunFolder
from orchestrator.worlds.memory import RunMemory, sweep

RESTARTS_MAX = 20
"""Failures of one agent, after which its node counts as broken and is left alone."""

FORGIVEN_S = 60.0
"""An agent that lives this long has one failure less to its name."""

AGAIN_S = 1.0
"""Pause before the next start of an agent that ended in order, or that could not be started."""

STRAYS_S = 0.02
"""While killed orphans are awaited, they are looked for this often."""
log = logging.getLogger("holdfast.supervisor")


def node_names(run: TrainingRun) -> tuple[NodeId, ...]:
    """Return the names of all nodes of a local run, spares last."""
    nodes = run.spec.nodes
    return tuple(NodeId(f"node-{index}") for index in range(nodes.count + nodes.spares))


@dataclass(slots=True)
class _Agent:
    node: NodeId
    incarnation: int
    child: subprocess.Popen[bytes]
    ended: int
    """Descriptor that becomes readable when it has ended."""
    began: float
    failures: float = 0.0
    """Failures of this node's agents in this command, less those that were forgiven."""
    again_at: float | None = None
    """When the next one is started; None until it is known that this one has ended."""
    hindered: bool = False
    """The next one could not be started so far."""
    left: bool = False
    """No other is started."""

    def judge(self, code: int, lost_for_s: float | None) -> str:
        """Decide what follows from its end; return it in words.

        Args:
            code: its exit code.
            lost_for_s: after how long its node is given back, if that is lost; None for never.
        """
        now = time.monotonic()
        self.again_at = now
        ended = f"agent of {self.node} ended with {code}"
        if code == NODE_LOST_EXIT and lost_for_s is not None:
            self.again_at = now + lost_for_s
            return f"{self.node} is lost for {lost_for_s:g} s"
        if code == NODE_LOST_EXIT:
            self.left = True
            return f"{self.node} is lost for good"
        if code == 0:
            # It was told to. As a rule the run is over, and the caller finds that out during this
            # pause; if not, somebody meant this one agent, and its node is as good as before.
            self.again_at = now + AGAIN_S
            return ended
        self.failures = max(0.0, self.failures - (now - self.began) / FORGIVEN_S) + 1.0
        self.left = self.failures > RESTARTS_MAX
        return f"{ended}, as others before it: {self.node} is left alone" if self.left else ended


class Machine:
    """The nodes of one local run. Every process it starts it also reaps.

    Args:
        run: whose nodes.
        folder: of the run.
        token: of the run's channels.
        timeouts: bounds of every wait.
    """

    def __init__(self, run: TrainingRun, folder: RunFolder, token: str, timeouts: Timeouts) -> None:
        self._run, self._folder, self._token, self._timeouts = run, folder, token, timeouts
        self._agents: dict[NodeId, _Agent] = {}
        self._strays: set[int] = set()
        """Orphans that were killed and are still there."""
        self._spared: set[int] = set()
        """Children that this process had before; it may have been put in a shell's place."""
        self._memory = RunMemory(folder)

    def start(self) -> None:
        """Start every node; adopt what their agents leave behind when they are killed.

        First frees what dead runs still have of this machine's memory.

        Raises:
            MemoryNotOursError: if others could replace the memory of the nodes.
            OSError: if an agent can not be started.
        """
        self._memory.claim()
        try:
            sweep()
        except OSError as error:
            log.warning("memory that dead runs may have left stays: %s", error)
        self._spared = set(linux.children())
        linux.adopt_orphans()
        nodes = node_names(self._run)
        # Agents can outlive the command that started them; two on one node can not both be.
        born.end(born.living(self._folder, nodes), self._timeouts)
        for node in nodes:
            last = born.Born.read(self._folder, node)
            self._agents[node] = self._start(node, last.incarnation + 1)

    def look(self, others: Iterable[int] = ()) -> list[str]:
        """Reap agents that ended and start them again; return what happened, in words.

        Args:
            others: children of this process that are no agents; every other one is an orphan of
                an agent that was killed, and is ended.
        """
        news = []
        for agent in [agent for _, agent in sorted(self._agents.items())]:
            code = agent.child.poll()
            if code is None:
                continue
            if agent.again_at is None:
                news.append(agent.judge(code, self._lost_for_s(agent.node)))
            if not agent.left and agent.again_at is not None and agent.again_at <= time.monotonic():
                news += self._start_again(agent)
        if news or self._strays:
            self._strays = linux.end_strays({*others, *self._spared, *self._pids()})
        return news

    def await_news(self, within_s: float, others: Iterable[int] = ()) -> None:
        """Return when an agent ends, or after `within_s`: nobody spins while nothing happens.

        Args:
            within_s: seconds to wait at most.
            others: descriptors that end the wait, too, when they become readable.
        """
        alive = [a.ended for a in self._agents.values() if a.child.poll() is None]
        linux.await_readable([*alive, *others], STRAYS_S if self._strays else within_s)

    def alive(self) -> list[NodeId]:
        """Return the nodes whose agent is running."""
        return [node for node, agent in sorted(self._agents.items()) if agent.child.poll() is None]

    def await_end(self, within_s: float) -> list[NodeId]:
        """Wait for agents to end by themselves; return those that have not."""
        deadline = time.monotonic() + within_s
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.alive()

    def config_of(self, node: NodeId, incarnation: int) -> AgentConfig:
        """Return what the agent of a node is told."""
        return AgentConfig(
            node=node,
            incarnation=incarnation,
            run=self._run.metadata.name,
            token=self._token,
            controller_file=str(self._folder.address),
            entrypoint=self._run.spec.trainer.entrypoint,
            ranks=self._run.spec.nodes.ranks_per_node,
            memory=str(self._memory.path / node),
            work=str(self._folder.nodes / node),
            logs=str(self._folder.logs),
            # All nodes are this one machine: a line of its kernel would take out every one of them.
            kernel_shared=True,
            serial=self._run.spec.nodes.serials.get(node, ""),
            signals="" if self._run.spec.detection.signals is None else str(self._folder.signals),
        )

    def close(self) -> None:
        """End every agent and child, whatever it does, and remove the memory of all nodes."""
        t = self._timeouts
        for number, within_s in (
            (signal.SIGTERM, t.terminate_s + t.kill_s + 1.0),
            (signal.SIGKILL, t.kill_s),
        ):
            for node in self.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._agents[node].child.pid, number)
            if not self.await_end(within_s):
                break
        deadline = time.monotonic() + t.kill_s
        while linux.end_strays(self._spared | self._pids()) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._memory.remove()

    def _lost_for_s(self, node: NodeId) -> float | None:
        """Return for how long a node said that it would be lost; None if it did not say."""
        try:
            return float((self._folder.nodes / node / LOST_FOR).read_text(encoding="ascii"))
        except FileNotFoundError:
            return None

    def _pids(self) -> set[int]:
        return {agent.child.pid for agent in self._agents.values()}

    def _start_again(self, last: _Agent) -> list[str]:
        """Start the next agent of a node; return what happened, in words.

        What keeps it from starting, a full disk for one, may pass: it is tried until then. How
        long the run waits for the node is for its controller to say (spec.recovery.spareWait).
        """
        try:
            agent = self._start(last.node, last.incarnation + 1)
        except OSError as error:
            last.again_at = time.monotonic() + AGAIN_S
            if last.hindered:
                return []
            last.hindered = True
            return [f"agent of {last.node} can not be started yet: {error}"]
        os.close(last.ended)
        agent.failures = last.failures
        self._agents[last.node] = agent
        return [f"agent of {last.node} started again"]

    def _start(self, node: NodeId, incarnation: int) -> _Agent:
        work = self._folder.nodes / node
        work.mkdir(parents=True, exist_ok=True)
        (work / LOST_FOR).unlink(missing_ok=True)
        config = self.config_of(node, incarnation)
        with (work / "agent.log").open("ab") as log:
            child = subprocess.Popen(
                # -P: what the user's folder has is not to stand in for modules of ours.
                [sys.executable, "-P", "-m", born.AGENT],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # A Ctrl-C in the terminal is for `holdfast run`, which then ends agents in order.
                start_new_session=True,
            )
        assert child.stdin is not None
        try:
            # First of all: should this command be killed here, one without a config ends by
            # itself, and one with a config is on record for the next command to end.
            born.Born.write(self._folder, node, incarnation, child.pid)
            ended = os.pidfd_open(child.pid)
        except OSError:
            child.kill()
            child.communicate()
            raise
        with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
            pipe.write(msgspec.json.encode(config))
        return _Agent(node, incarnation, child, ended, time.monotonic())
