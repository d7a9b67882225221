"""Keeps a warm process at hand and has ranks forked from it, without blocking the event loop."""

from __future__ import annotations

import asyncio
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.agent.warm import Warm, WarmUpError

log = logging.getLogger(__name__)
IMPORT_WITHIN_S = 600.0
"""Importing a trainer from a slow file system may take minutes; more than this is a failure."""


class NurseryClosedError(Exception):
    """The agent is ending, and no rank is forked any more."""

    hint = "None needed."


class Nursery:
    """Forks ranks. A warm process that is gone is replaced; one that can not import is not kept.

    Args:
        entrypoint: `module:function` of the trainer.
        log_file: what is printed while importing is appended here.
    """

    def __init__(self, entrypoint: str, log_file: Path) -> None:
        self._entrypoint, self._log_file = entrypoint, log_file
        self._warm: Warm | None = None
        self._closed = False
        # One thread: the warm process answers one order at a time.
        self._thread = ThreadPoolExecutor(1, "fork")

    def warm_up(self) -> None:
        """Start importing, unless that is done or under way. On the loop's thread only.

        Raises:
            NurseryClosedError: after `close`.
        """
        self._at_hand()

    @property
    def pid(self) -> int | None:
        """Process id of the warm process, if there is one."""
        return self._warm.pid if self._warm is not None else None

    async def fork(
        self, environment: dict[str, str], control: socket.socket, control_variable: str, out: Path
    ) -> int:
        """Start a rank as `Warm.fork` does, once the trainer is imported; return its process id.

        Do not cancel it: the process would be there all the same, and nobody would know it.

        Raises:
            NurseryClosedError: after `close`, also if that comes while the trainer is imported.
            WarmUpError: if the trainer can not be imported, or forking fails twice.
        """
        loop = asyncio.get_running_loop()

        def fork(warm: Warm) -> int:
            warm.wait_ready(IMPORT_WITHIN_S)
            return warm.fork(environment, control, control_variable, out)

        for last in (False, True):
            warm = self._at_hand()
            try:
                return await loop.run_in_executor(self._thread, fork, warm)
            except WarmUpError as error:
                if self._closed:
                    raise NurseryClosedError("the agent ends") from error
                if self._warm is warm:
                    self._warm = None
                    self._give_up(warm)
                if last or error.answer is not None:
                    raise
                log.warning("%s; a new warm process is started", error)
        raise AssertionError("the loop returns or raises")

    def close(self) -> None:
        """End the warm process; a fork under way gives a rank that was born already, or raises."""
        self._closed = True
        warm, self._warm = self._warm, None
        if warm is not None:
            self._give_up(warm)
        # What waits there finds the warm process gone, and says so to whoever asked for it.
        self._thread.shutdown(wait=False)

    def _give_up(self, warm: Warm) -> None:
        warm.end()
        # Behind the fork under way, which may yet hear of a rank that the agent is to know.
        self._thread.submit(warm.close)

    def _at_hand(self) -> Warm:
        if self._closed:
            raise NurseryClosedError("the agent ends")
        if self._warm is None:
            with self._log_file.open("ab") as output:
                self._warm = Warm(self._entrypoint, output)
        return self._warm
