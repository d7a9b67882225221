"""Ranks look whether what they added up is the sum of what each of them had put in.

Adding up is linear: all numbers of the gradients that ranks put in come to as much as all numbers
of the gradient that came out, but for rounding. A sum that arrives wrong on all ranks alike, from a
link, a switch or a buffer, differs from that, and no comparison of replicas would show it. Nobody
is named: the step is computed again.

A fault comes out otherwise then, or not at all, or as far off as no rounding is. What is off by the
same once more, and by a few times the bound, is none that can be told from a bound that does not
hold for this model: ranks go on without looking, and say so. What looks must not end what it looks
at.

Letters: r a rank, R ranks, g_r what r puts in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainer.gradients import PutIn
from trainer.guard import Guard
from trainer.ring import Ring, Told

WORDS = 4
"""Numbers that a rank says in a step: `PutIn`, and the sum of its part of what came out."""
OFF = math.nan
EPS = 2.0**-24
"""By how much a float32 is off at most when it was rounded, as a share of itself."""
ROOM = 32.0
"""Times the deviation that rounding is expected to make: an estimate from above, so that chance
never comes near. What is seen of a single number is a 1e-5th of the norm with two ranks, and less
with more: a 1e-3rd with 64."""

FAR = 8.0
"""Times the bound that a model may be off by, each time, before it is no matter of the bound: with
`ROOM`, 256 times what rounding is expected to make."""


def explained(put_in: Sequence[PutIn]) -> float:
    """Return how far the two sums may be apart for nothing but rounding.

    Each number is rounded R - 1 times as ranks are added up, each time by EPS of what is there so
    far, which over all numbers is no more than all norms together; and each rank rounds when it
    adds its own numbers up in pairs, by some few EPS of its norm (measured: 2.1 of 2**23 numbers of
    either sign), and of what they come to if they have one sign (measured: 0.3 of that of 10**6).

    Args:
        put_in: by r.
    """
    spread = (math.sqrt(len(put_in)) + 4.0) * math.fsum(each.norm for each in put_in)
    return ROOM * EPS * (spread + math.fsum(each.sizes for each in put_in))


class Sums:
    """Those of one rank.

    Args:
        ring: has a step computed again.
        replicas: each has all of what came out.
        possible: whether ranks put in whole gradients of what they add up.
    """

    def __init__(self, ring: Ring, replicas: int, *, possible: bool) -> None:
        self._ring, self._replicas = ring, replicas
        self._guard = Guard("sums")
        self._step, self._off_by = 0, list[list[float]]()
        """By how much the sums of a step were off, of each replica, in each attempt at it."""
        if not possible:
            self._guard.stop()

    def forget(self) -> None:
        """Begin as after a restore: steps to come may have the numbers of others."""
        self._off_by = []

    def words(self, put_in: PutIn | None, part: Sequence[Tensor]) -> tuple[float, ...]:
        """Return what this rank tells the others in a step: `WORDS` numbers.

        Args:
            put_in: of its gradients, before ranks added up; None if nobody looked.
            part: of the gradient that came out, as it is about to move the weights.
        """
        nothing = (OFF,) * WORDS
        if put_in is None or self._guard.stopped:
            return nothing
        return self._guard.call(lambda: (*put_in, math.fsum(map(total, runs(part)))), nothing)

    def differ(self, step: int, words: Sequence[Sequence[float]], reporter: Told) -> bool:
        """Compare the sums; return whether the step is to be thrown away.

        Args:
            step: its number.
            words: of all ranks, so that all come to the same.
            reporter: hears of it.
        """
        self._guard.tell(reporter)
        if not all(map(math.isfinite, (number for each in words for number in each))):
            return False  # nobody looked, or the numbers are such that others look at them
        rows = [PutIn(*each[:3]) for each in words]
        put_in, bound = math.fsum(each.total for each in rows), explained(rows)
        size = len(words) // self._replicas
        came_out = [
            math.fsum(each[3] for each in words[first : first + size])
            for first in range(0, len(words), size)
        ]
        off_by = [each - put_in for each in came_out]
        # Where some replicas have what was put in, comparing replicas names those that have not.
        if any(abs(each) <= bound for each in off_by):
            return False
        evidence = (
            f"the gradient adds up to {came_out[0]:.9g}, and what all ranks put into it to "
            f"{put_in:.9g}; rounding explains {bound:.2g}"
        )
        if self._was_off_by(step, off_by, bound):
            self._guard.give_up(
                f"in step {step}, also when it is computed again, {evidence}: what is always the "
                "same is rather what rounding does to this model than a fault, and no sum is "
                "compared any more",
                tells=self._ring.tells,
            )
            self._guard.tell(reporter)
            return False
        self._ring.add_up_again(step, evidence, reporter, since=step - 1)
        return True

    def _was_off_by(self, step: int, off_by: Sequence[float], bound: float) -> bool:
        """Return whether a step was off by as little, and the same, in another attempt."""
        if step != self._step:
            self._step, self._off_by = step, []
        before = self._off_by
        self._off_by = [*before, list(off_by)]
        return any(
            all(abs(now - then) <= bound for now, then in zip(off_by, each, strict=True))
            for each in before
            if max(map(abs, off_by)) <= FAR * bound
        )


def runs(part: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield tensors flat, those that lie behind each other in memory as one.

    FSDP leaves what it has added up together in one piece of memory, and each call takes its time.
    """
    run: list[Tensor] = []
    for tensor in part:
        if run and not _follows(run[-1], tensor):
            yield _flat(run)
            run = []
        run.append(tensor)
    if run:
        yield _flat(run)


def _follows(before: Tensor, tensor: Tensor) -> bool:
    return (
        before.is_contiguous()
        and tensor.is_contiguous()
        and before.dtype == tensor.dtype
        and before.storage_offset() + before.numel() == tensor.storage_offset()
        and before.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    )


def _flat(run: list[Tensor]) -> Tensor:
    first = run[0]
    if len(run) == 1:
        return first.reshape(-1)
    return first.as_strided((sum(tensor.numel() for tensor in run),), (1,))


def total(gradient: Tensor) -> float:
    """Return the sum of all numbers of a gradient, added up in float32 and in pairs."""
    return float(gradient.sum(dtype=torch.float32))
