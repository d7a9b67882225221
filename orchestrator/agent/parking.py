"""Has processes stand by, rehearsed and without a seat, so that nobody waits for one to be made."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from orchestrator.agent.exits import NODE_HINT
from orchestrator.agent.live import LiveRank
from orchestrator.agent.nursery import NurseryClosedError
from orchestrator.agent.ranks import Ranks
from orchestrator.agent.warm import WarmUpError

log = logging.getLogger(__name__)
RETRY_MIN_S = 1.0
RETRY_MAX_S = 60.0


class Parking:
    """One node's.

    Args:
        ranks: its processes.
        wanted: returns how many shall stand by as of now.
    """

    def __init__(self, ranks: Ranks, wanted: Callable[[], int]) -> None:
        self._ranks, self._wanted = ranks, wanted
        self._pause_s = RETRY_MIN_S

    async def refill(self) -> None:
        """Fork what is missing and end what is too much; a failure is logged."""
        try:
            await self._ranks.refill(self._wanted())
        except NurseryClosedError:
            log.debug("nobody stands by: the agent ends")
        except WarmUpError as error:
            log.error("nobody stands by: %s; hint: %s", error, error.hint)  # noqa: TRY400 - one line
        except OSError as error:
            log.error("nobody stands by: %s; hint: %s", error, NODE_HINT)  # noqa: TRY400 - the same

    async def replace(self, live: LiveRank, code: int) -> None:
        """Replace one that ended without ever having had a seat; more slowly every time."""
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, RETRY_MAX_S)
        log.warning("parked process %d ended with %d; next in %.0f s", live.pid, code, pause_s)
        await asyncio.sleep(pause_s)
        await self.refill()
