"""One look at a shard at a time, which whoever needs it meanwhile joins.

Two that mended the same file would each find what the other is writing, and drop the shard for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from orchestrator.agent.shards import Shard


@dataclass(slots=True)
class _Look:
    task: asyncio.Task[None]
    waiting: int = 0
    """How many want its outcome. When the last one gives up, it ends as soon as it can."""


class Looks:
    """Those that are under way; each is a task, on the event loop."""

    def __init__(self) -> None:
        self._under_way: dict[Shard, _Look] = {}

    async def join(self, shard: Shard, look: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait for the look at a shard that is under way, or begin one; raise what it raises."""
        while (known := self._under_way.get(shard)) is not None and not known.waiting:
            # Given up by all: what a thread of it still writes must be over before the next.
            await asyncio.wait([known.task])
        if known is None:
            known = self._under_way[shard] = _Look(asyncio.create_task(look()))
            known.task.add_done_callback(partial(self._over, shard))
        known.waiting += 1
        try:
            # Whoever gives up waiting ends nobody else's look.
            await asyncio.wait([known.task])
        finally:
            known.waiting -= 1
            if not known.waiting:
                known.task.cancel()
        known.task.result()

    def _over(self, shard: Shard, task: asyncio.Task[None]) -> None:
        del self._under_way[shard]
        if not task.cancelled():
            task.exception()  # known to whoever waits; else nobody is there to be told
