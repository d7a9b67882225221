"""Ranks look whether others train on the samples that they are to train on: a journal of data.

In every step each rank digests the tokens that it was handed, and those that another rank should
have been, as they are read here. Whoever was handed others, by its disk or its memory, is found out
before the step moves anything. Reading is cheap beside computing, so all of it is read twice, in a
thread beside the step, which nobody waits for when a rank ends: a disk may keep it for ever. Where
reading takes longer than the step, the step is not kept waiting for long, and its samples are not
compared.

Who reads the same other samples each time has them on its disk, or in what its node keeps of them:
then it is the data, for which no device is to blame.

Samples of some steps are read at once: a thread that was idle finds nothing of its program in the
core's caches, and takes four times as long for the first of them as for each further one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from orchestrator.worker import RankPhase
from trainer.aside import Asked
from trainer.blame import Verdict
from trainer.data import Batch
from trainer.guard import Guard
from trainer.replay import joined, split
from trainer.ring import Ring, Told

OFF, LATE = -1.0, -2.0
"""What a rank says that does not look any more, and that has not read in time; halves of digests
are never negative."""
WITHIN_S = 0.5
"""For which a step waits for what is read beside it, once: while that is not there, the steps that
follow do not wait. It was begun with the step, and takes milliseconds. A source that has stopped
holds up all ranks for as long before the one that reads from it is looked at (detect/hang.py)."""
WORDS = 4
"""Numbers that a rank says in a step: its own digest, and that of another rank's samples."""
AT_ONCE = 8
"""Steps whose samples are asked for at once."""


class Readings:
    """Those of one rank.

    Args:
        ring: knows who has which samples.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._guard = Guard("readings")
        self._handed: list[Batch] = []
        chain = ring.chain
        self._step = 0
        self._asked: dict[int, Asked[int]] = {}
        """What is read for each step, this one and some to come."""
        self._late: Asked[int] | None = None
        """What a step has waited for in vain."""
        # Samples do not follow from each other, whatever is computed from them.
        self._chain = chain._replace(links=[[1]] * chain.together)

    def forget(self) -> None:
        """Begin as after a restore: steps to come may have other samples, or others' numbers."""
        self._asked = {}

    def begin(self, step: int) -> None:
        """Begin to compute a step, or begin anew."""
        self._handed, self._step = [], step
        if self._guard.stopped or step in self._asked:
            return
        if any(asked.busy for asked in self._asked.values()):
            return
        self._asked = {each: self._ask(each) for each in range(step, step + AT_ONCE)}

    def _ask(self, step: int) -> Asked[int]:
        ahead = self._ring.ahead(self._shift(step))
        # Where reading is slower than steps, those that are over by then are not read for.
        return self._ring.aside.ask(lambda: self._digest(step, ahead) if step >= self._step else 0)

    def read(self, batch: Batch) -> None:
        """Take note of samples that this rank trains on, in order."""
        self._handed.append(batch)

    def words(self, step: int, alive: Callable[[], None]) -> tuple[float, ...]:
        """Return what this rank tells the others in a step: `WORDS` numbers.

        Args:
            step: its number.
            alive: is called now and then while this waits.
        """
        if self._guard.stopped:
            return (OFF,) * WORDS
        asked = self._asked.get(step)
        if asked is None or (self._late is not None and self._late.busy):
            return (LATE,) * WORDS
        if not asked.over(alive, WITHIN_S):
            self._late = asked
            return (LATE,) * WORDS

        def both() -> tuple[float, ...]:
            return (*split(self._own()), *split(asked.result()))

        return self._guard.call(both, (OFF,) * WORDS)

    def _own(self) -> int:
        total = xxhash.xxh3_64()
        for batch in self._handed:
            _add(total, batch)
        return total.intdigest()

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
        if self._guard.stopped or any(LATE in each for each in words):
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
            lambda of: self._read_again(step, of, reporter),
            shift,
            self._chain,
            how="read",
        )
        self._guard.tell(reporter)
        if found is None:
            return False
        found = self._attributed(found, step, words, reporter)
        # Those of the steps before were compared in them.
        self._ring.throw_away(step, found, reporter, since=step - 1)
        return True

    def _attributed(
        self, found: Verdict, step: int, words: Sequence[Sequence[float]], reporter: Told
    ) -> Verdict:
        """Return a verdict with whether it is the data, which is so if all read the same again.

        What a device or its memory made of samples is not there any more once they are read anew.
        """
        own = self._ring.ahead(0)
        handed, read = joined(*words[own][:2]), joined(*words[own][2:])
        then = {own: handed, self._ring.ahead(self._shift(step)): read}
        same = all(
            bool(self._read_again(step, of, reporter) == _word(before))
            for of, before in then.items()
        )
        rows = self._ring.exchange(self._guard, torch.tensor(int(same)))
        self._guard.tell(reporter)
        if rows is None or not all(rows[rank][0] == (1,) for rank in found.ranks):
            return found
        evidence = f"{found.evidence}; they read the same there each time, so it is the data"
        return found._replace(of_data=True, evidence=evidence)

    def _shift(self, step: int) -> int:
        """Return how many places further on the rank is whose samples are read here."""
        chain = self._chain
        readers = len(chain.ranks) // chain.together
        return chain.together * (1 + step % (readers - 1))

    def _digest(self, step: int, of: int) -> int:
        total = xxhash.xxh3_64()
        for indices in stretches(self._ring.share(of)):
            _add(total, self._ring.samples.batch(step, indices))
        return total.intdigest()

    def _read_again(self, step: int, of: int, reporter: Told) -> Tensor:
        asked = self._ring.read_aside(lambda: self._digest(step, of), reporter)
        reporter.phase(RankPhase.OPTIMIZER)
        found = self._guard.call(asked.result, 0)
        return _word(found)


def _word(found: int) -> Tensor:
    return torch.tensor(found - (1 << 64) if found >> 63 else found)


def stretches(shares: Sequence[range]) -> list[range]:
    """Return micro-batches, those that follow each other as one: each has to be asked for.

    >>> stretches([range(4, 6), range(6, 8), range(12, 14)])
    [range(4, 8), range(12, 14)]
    """
    found: list[range] = []
    for share in shares:
        if found and found[-1].stop == share.start:
            share = range(found.pop().start, share.stop)  # noqa: PLW2901 - it is longer now
        found.append(share)
    return found


def _add(total: xxhash.xxh3_64, batch: Batch) -> None:
    """Add samples, one after the other: the same in whatever batches they were read."""
    for inputs, targets, cuts in zip(batch.inputs, batch.targets, batch.cuts, strict=True):
        total.update(np.ascontiguousarray(inputs).data)
        total.update(np.ascontiguousarray(targets).data)
        total.update(repr(cuts).encode())
