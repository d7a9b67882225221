"""Ranks look whether others train on the samples that they are to train on: a journal of data.

In every step each rank digests the tokens that it was handed, and those that another rank should
have been, as they are read here. Whoever was handed others, by its disk or its memory, is found out
before the step moves anything. Reading is cheap beside computing, so that all of it is read twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from trainer.data import Batch
from trainer.guard import Guard
from trainer.replay import halves, joined
from trainer.ring import Ring, Told

OFF = -1.0
"""What a rank says that does not look any more; halves of digests are not negative."""
WORDS = 4
"""Numbers that a rank says in a step: its own digest, and that of another rank's samples."""


class Readings:
    """Those of one rank.

    Args:
        ring: knows who has which samples.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._guard = Guard("readings")
        self._own = xxhash.xxh3_64()
        chain = ring.chain
        # Samples do not follow from each other, whatever is computed from them.
        self._chain = chain._replace(links=[[1]] * chain.together)

    def begin(self) -> None:
        """Begin to compute a step, or begin anew."""
        self._own.reset()

    def read(self, batch: Batch) -> None:
        """Take note of samples that this rank trains on, in order."""
        if not self._guard.stopped:
            self._guard.call(lambda: _add(self._own, batch), None)

    def words(self, step: int) -> tuple[float, ...]:
        """Return what this rank tells the others in a step: `WORDS` numbers."""
        nothing = (OFF,) * WORDS
        if self._guard.stopped:
            return nothing
        ahead = self._ring.ahead(self._shift(step))

        def both() -> tuple[float, ...]:
            theirs = self._digest(step, ahead)
            return tuple(halves(torch.stack((_signed(self._own), theirs))).tolist())

        return self._guard.call(both, nothing)

    def differ(self, step: int, words: Sequence[Sequence[float]], reporter: Told) -> bool:
        """Find out who was handed other samples; return whether the step is to be thrown away.

        Args:
            step: its number.
            words: of all ranks; alike everywhere, so that all find out, or none.
            reporter: hears of it.
        """
        if any(OFF in each for each in words):
            self._guard.stop()
        self._guard.tell(reporter)
        if self._guard.stopped:
            return False
        shift, ranks = self._shift(step), self._chain.ranks
        size = len(ranks)
        if all(
            words[rank][2:] == words[ranks[(place + shift) % size]][:2]
            for place, rank in enumerate(ranks)
        ):
            return False
        pairs = [((joined(*words[rank][:2]),), (joined(*words[rank][2:]),)) for rank in ranks]
        found = self._ring.find_out(
            self._guard,
            pairs,
            lambda of: self._digest_or_nothing(step, of),
            shift,
            self._chain,
            how="read",
        )
        self._guard.tell(reporter)
        if found is None:
            return False
        # Those of the steps before were compared in them.
        self._ring.throw_away(step, found, reporter, since=step - 1)
        return True

    def _shift(self, step: int) -> int:
        """Return how many places further on the rank is whose samples are read here."""
        chain = self._chain
        readers = len(chain.ranks) // chain.together
        return chain.together * (1 + step % (readers - 1))

    def _digest(self, step: int, of: int) -> Tensor:
        total = xxhash.xxh3_64()
        for indices in self._ring.share(of):
            _add(total, self._ring.samples.batch(step, indices))
        return _signed(total)

    def _digest_or_nothing(self, step: int, of: int) -> Tensor:
        return self._guard.call(lambda: self._digest(step, of), torch.zeros((), dtype=torch.int64))


def _add(total: xxhash.xxh3_64, batch: Batch) -> None:
    total.update(batch.inputs.tobytes())
    total.update(batch.targets.tobytes())
    total.update(repr(batch.cuts).encode())


def _signed(total: xxhash.xxh3_64) -> Tensor:
    number = total.intdigest()
    return torch.tensor(number - (1 << 64) if number >> 63 else number)
