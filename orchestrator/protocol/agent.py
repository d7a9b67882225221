"""What an agent is told when it is started: who it is, where its things are, whom to call.

Travels as one JSON text on the agent's standard input, so that the token is on no command line.
"""

from __future__ import annotations

import msgspec

from orchestrator.protocol.ids import NodeId

AGENT_PATH = "/agent"
"""Path of the agent channel on the controller's server."""
NODE_LOST_EXIT = 73
"""Exit code of an agent that a fault plan told to take its whole node away."""
LOST_FOR = "lost-for"
"""File in a node's folder: for how many seconds it is lost, if that is not for good."""


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an agent needs before it has met its controller."""

    node: NodeId
    incarnation: int
    """Grows by one with each start of this node's agent."""
    run: str
    """Name of the run."""
    token: str
    """Shown to the controller and to other agents, and asked of them."""
    controller_file: str
    """File that holds a `ControllerAddress` as JSON; read again before every attempt."""
    entrypoint: str
    """`module:function` that the warm process imports."""
    ranks: int
    """Most ranks this node will have seats for."""
    memory: str
    """Folder of this node on a memory file system; made and removed by the agent."""
    work: str
    """Folder of this node on disk; outlives the agent."""
    logs: str
    """Folder for what ranks print: rank-00000.log and so on, appended to."""
    kernel_log: str = "/dev/kmsg"
    """Where the kernel says what happens to this node's hardware."""
    kernel_shared: bool = False
    """Other nodes have the same kernel, so what it says is noted and takes out none of them. For
    the same reason the machine's identity is none of a node's: its name belongs to it."""
    serial: str = ""
    """Of this node's machine, if whoever started the agent states it (spec.nodes.serials)."""
    signals: str = ""
    """File with entries of a table of signals that take the place of ours; "" for none."""
    host: str = "127.0.0.1"
    """Address on which other nodes reach this one."""


class ControllerAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the controller of a run listens now."""

    url: str
    """http://host:port"""
    pid: int
    incarnation: int


def read_config(text: bytes) -> AgentConfig:
    """Decode what an agent was given. Raises msgspec.DecodeError if it is not that."""
    return msgspec.json.decode(text, type=AgentConfig)
