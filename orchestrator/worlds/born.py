"""The agent that was last started for a node, on disk: any later command can find and end it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from orchestrator.agent import linux
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worlds.folder import RunFolder

AGENT = "orchestrator.agent"
"""The module that an agent runs; its command line names it."""


class Born(msgspec.Struct, frozen=True):
    """The last agent that was started for a node."""

    incarnation: int
    pid: int
    ticks: int
    """Start of the process since boot: together with the number it names one process for good."""

    @classmethod
    def read(cls, folder: RunFolder, node: NodeId) -> Born:
        """Return what is on record; incarnation 0 if nothing is."""
        try:
            return msgspec.json.decode((folder.nodes / node / "born.json").read_bytes(), type=cls)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            return cls(0, 0, -1)

    @classmethod
    def write(cls, folder: RunFolder, node: NodeId, incarnation: int, pid: int) -> None:
        """Put an agent on record, in place of the one before. Raises OSError if it can not be."""
        path = folder.nodes / node / "born.json"
        temporary = path.with_name(".born.json")
        temporary.write_bytes(msgspec.json.encode(cls(incarnation, pid, _start_ticks(pid))))
        temporary.replace(path)

    def open(self) -> int:
        """Return a descriptor of the process if it is still there, -1 if not; close it."""
        if self.ticks < 0 or self.pid <= 0:
            return -1
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return -1
        # In this order: whatever the number means from now on, the descriptor is of this process.
        if _start_ticks(self.pid) == self.ticks and _is_agent(self.pid):
            return descriptor
        os.close(descriptor)
        return -1


class Living(NamedTuple):
    """An agent that is still there."""

    node: NodeId
    pid: int
    descriptor: int


def living(folder: RunFolder, nodes: Iterable[NodeId]) -> list[Living]:
    """Return the agents on record that are still there, by node; hand them to `end`."""
    found = []
    for node in sorted(nodes):
        born = Born.read(folder, node)
        if (descriptor := born.open()) >= 0:
            found.append(Living(node, born.pid, descriptor))
    return found


def end(agents: list[Living], timeouts: Timeouts) -> list[Living]:
    """End agents, each with its ranks: SIGTERM, then SIGKILL. Return those that survive both.

    They need not be children of this process.
    """
    t = timeouts
    left = agents
    for number, within_s in (
        (signal.SIGTERM, t.terminate_s + t.kill_s + 1.0),
        (signal.SIGKILL, t.kill_s),
    ):
        for agent in left:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(agent.descriptor, number)
        deadline = time.monotonic() + within_s
        while left and (wait_s := deadline - time.monotonic()) > 0:
            ended = linux.await_readable([agent.descriptor for agent in left], wait_s)
            left = [agent for agent in left if agent.descriptor not in ended]
    for agent in agents:
        os.close(agent.descriptor)
    return left


def _is_agent(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return AGENT.encode() in command.split(b"\0")


def _start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; -1 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return int(text.rpartition(")")[2].split()[19])
