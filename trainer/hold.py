"""Ranks that hold something else than their twins wait for orders before they learn from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

Digests: TypeAlias = Sequence[Sequence[float] | None]

HOLD_S = 30.0
"""How long orders are waited for. Assumed: a controller decides within a few beats of 2 s."""


class Hold:
    """Waits once: if nobody comes, what looked may be what is wrong, and training goes on.

    Args:
        shards: of each rank, which shard it holds; those with the same one are to hold the same.
    """

    def __init__(self, shards: Sequence[int]) -> None:
        self._shards, self._over = shards, False

    def __call__(self, digests: Digests, alive: Callable[[], None]) -> None:
        """Wait for orders if ranks of the same shard differ.

        The controller finds the same, and says who leaves and where to go on. Meanwhile nothing
        wrong is learned, and what memory has from before is not given up for newer states.

        Args:
            digests: of each rank, None if it has none; alike everywhere, so that all wait or none.
            alive: is called now and then; it raises when orders have come.
        """
        if self._over or not differ(self._shards, digests):
            return
        deadline = time.monotonic() + HOLD_S
        while time.monotonic() < deadline:
            alive()
            time.sleep(0.02)
        self._over = True


def differ(shards: Sequence[int], digests: Digests) -> bool:
    """Return whether ranks that hold the same shard do not hold the same.

    Args:
        shards: of each rank, which it holds.
        digests: of each rank, None if it has none.
    """
    first: dict[int, Sequence[float]] = {}
    told = ((s, d) for s, d in zip(shards, digests, strict=True) if d is not None)
    return any(first.setdefault(shard, found) != found for shard, found in told)
