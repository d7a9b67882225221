"""`python -m orchestrator.agent`: one node's agent. Its config comes on standard input."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import msgspec

from orchestrator.agent import linux
from orchestrator.agent.hardware import meet
from orchestrator.agent.memory import Memory, MemoryInUseError
from orchestrator.agent.node import Node
from orchestrator.agent.nursery import Nursery
from orchestrator.protocol.agent import AgentConfig, read_config

log = logging.getLogger("orchestrator.agent")

CONFIG_MAX_BYTES = 1 << 20
EXIT_ERROR = 1
EXIT_USAGE = 2
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end an agent in order."""


def main() -> int:
    """Read the config and live; return the exit code."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s.%(msecs)03d %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    faulthandler.enable()
    try:
        config = read_config(sys.stdin.buffer.read(CONFIG_MAX_BYTES))
    except msgspec.MsgspecError as error:
        log.error("standard input is no agent config: %s", error)  # noqa: TRY400 - the user's mistake
        return EXIT_USAGE
    # Until somebody heeds them: one that came between would leave memory behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        linux.require()
        for folder in (config.work, config.logs):
            Path(folder).mkdir(parents=True, exist_ok=True)
        memory = Memory(Path(config.memory))
    except (linux.UnsupportedSystemError, MemoryInUseError) as error:
        log.error("%s; hint: %s", error, error.hint)  # noqa: TRY400 - says it all
        return EXIT_ERROR
    except OSError as error:
        log.error("%s", error)  # noqa: TRY400 - names the folder
        return EXIT_ERROR
    try:
        linux.adopt_orphans()
        return asyncio.run(_live(config, memory))
    except Exception:
        log.exception("the agent of %s ends", config.node)
        memory.remove()
        return EXIT_ERROR


async def _live(config: AgentConfig, memory: Memory) -> int:
    nursery = Nursery(config.entrypoint, Path(config.work) / "warm.log")
    # On a machine of several nodes, its GPUs are none of theirs.
    boards = () if config.kernel_shared else meet()
    node = Node(config, memory, nursery, boards)
    loop = asyncio.get_running_loop()
    for number in ENDING:
        loop.add_signal_handler(number, node.end, 0, f"told to by {number.name}")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    # Not before: what is started inherits the mask.
    nursery.warm_up()
    log.info("agent of %s, process %d", config.node, os.getpid())
    code = await node.run()
    # Not through the interpreter's exit: it joins threads, and one may hang in a dead file system.
    _leave(code)


def _leave(code: int) -> NoReturn:
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
