"""Faults of a plan in which a rank comes to other collectives than all others do.

That is what a branch does that depends on the rank. It strikes the next sum of gradients: a program
can go on without one, and comes to the next collective as if nothing were amiss.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.groups import SUMS

OTHER_NUMBERS = 77
"""Of which a rank gathers all, where the others add up gradients."""


class _Over(dist.Work):
    """A collective that nobody has begun."""

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        """Return at once."""
        del timeout
        return True

    def is_completed(self) -> bool:
        """Return that it is."""
        return True


def leave_out(group: dist.ProcessGroup) -> dist.Work:
    """Return as if a collective of a group were over."""
    del group
    return _Over()


def enter_another(group: dist.ProcessGroup) -> dist.Work:
    """Begin another collective of a group than the others do."""
    own = torch.ones(OTHER_NUMBERS)
    rows = [torch.empty_like(own) for _ in range(group.size())]
    work: dist.Work | None = dist.all_gather(rows, own, group=group, async_op=True)
    assert work is not None
    return work


def at_next_sum(instead: Callable[[dist.ProcessGroup], dist.Work]) -> None:
    """Have something else come of the next sum of gradients in this process; once."""
    real = {name: vars(dist.ProcessGroup)[name] for name in SUMS if name in vars(dist.ProcessGroup)}

    def stray(self: dist.ProcessGroup, *_: Any, **__: Any) -> dist.Work:  # noqa: ANN401 - as called
        for name, method in real.items():
            setattr(dist.ProcessGroup, name, method)
        return instead(self)

    for name in real:
        setattr(dist.ProcessGroup, name, stray)
