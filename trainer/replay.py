"""Has ranks compute another rank's micro-batch once more, and says who computes wrongly.

A wrong product on one rank is in the sum of all gradients, and so in every replica: comparing
replicas can not see it. Computing it again elsewhere does. Every so many steps each rank computes
the last micro-batch of the rank `shift` further on, from weights that are the same everywhere, and
the digests of both gradients are compared before the step moves anything.

Letters: r a rank, s the shift.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.shares import Share

HALF = 1 << 32
VOTERS_MIN = 3
LONGEST, COSTS = 4, 3
"""Replays that cost more than their share come more rarely, by so many times at most; what they
cost is known once so many were seen."""
TRIED_MAX = 3
"""Micro-batches that all ranks compute once more to find out who was wrong."""


def halves(digests: Tensor) -> Tensor:
    """Return int64 digests as pairs of float64, which hold 32 bits exactly."""
    low = digests & (HALF - 1)
    high = (digests >> 32) & (HALF - 1)
    return torch.stack((low, high), -1).double().flatten()


def joined(low: float, high: float) -> int:
    """Return the digest that went over as two float64."""
    return int(high) * HALF + int(low)


def every(time_share: float, work: Share) -> int:
    """Return after how many steps it is done again, to take that share of the time.

    A replay is one micro-batch more for every rank, as long as nobody knows better. What a rank
    has itself may be fewer than what others have, and all of them must come to the same number:
    they wait for each other in it.
    """
    return max(math.ceil(1 / (time_share * work.most)), 1)


class Pace:
    """After how many steps replays come, from what they were seen to cost.

    Args:
        share: of the time of a step, that they may take.
        work: of any rank.
        watched: whether they come in every step in this generation, whatever they take.

    Attributes:
        every: so many steps.
        longest: never more than so many, whatever they cost, in any generation of the run.
        fixed: whether that stays as it is, as it does if they may take all the time they want.
    """

    def __init__(self, share: float, work: Share, *, watched: bool = False) -> None:
        self._least = every(share, work)
        self.every = 1 if watched else self._least
        # Also of a generation in which all was looked at: the one before it may not have been.
        self.longest = LONGEST * self._least
        self.fixed = watched or share >= 1
        self._share = share
        self._costs: deque[float] = deque(maxlen=COSTS)

    def paid(self, costs: Sequence[float]) -> None:
        """Hear what a replay cost each rank, in steps; 0 of who does not know.

        Who came first has waited for the others, in what it takes for its cost: the least is true.
        All ranks hear the same, and so come to the same.
        """
        if self.fixed or not costs or min(costs) <= 0:
            return
        self._costs.append(min(costs))
        if len(self._costs) == COSTS:
            wanted = math.ceil(median(self._costs) / self._share)
            self.every = min(max(wanted, self._least), self.longest)


def known_good(restored: int, longest: int) -> int:
    """Return the last step that a replay vouches for, of a world that was restored to a step.

    What it was restored to was saved after the last replay before it, and nobody has looked since.

    Args:
        restored: the step.
        longest: the most steps that may lie between two replays.

    >>> known_good(150, 40)
    109
    """
    return max(restored - longest - 1, 0)


class Mismatch(NamedTuple):
    """A micro-batch that came out differently."""

    producer: int
    """Whose it was."""
    replayer: int
    """Who computed it once more."""


def mismatches(rows: Sequence[tuple[int, int]], shift: int) -> list[Mismatch]:
    """Return what came out differently.

    Args:
        rows: of each rank, the digest of its own micro-batch and of the one that it computed for
            the rank `shift` further on.
        shift: see there.
    """
    return [
        Mismatch((rank + shift) % len(rows), rank)
        for rank, (_, replayed) in enumerate(rows)
        if replayed != rows[(rank + shift) % len(rows)][0]
    ]


def tried(found: Sequence[Mismatch], together: int = 1) -> list[int]:
    """Return whose micro-batches all ranks compute once more; of a group, the first is named.

    Args:
        found: what came out differently.
        together: ranks of a group that computes a micro-batch together.
    """
    return list(dict.fromkeys(edge.producer // together * together for edge in found))[:TRIED_MAX]


def of_itself(rows: Sequence[Sequence[int]]) -> str:
    """Say why replays mean nothing here; "" if they do.

    A device that errs at times differs from itself, too, but hardly more than half of them do.

    Args:
        rows: of each rank, digests of its own micro-batch, computed once more, and again.
    """
    differ = sum(first != second for first, second in rows)
    if 2 * differ <= len(rows):
        return ""
    return (
        f"{differ} of {len(rows)} ranks get another gradient each time that they compute the same "
        "micro-batch: what differs elsewhere shows nothing"
    )


class Verdict(NamedTuple):
    """Who computes wrongly, as far as can be said."""

    ranks: tuple[int, ...]
    proven: bool
    evidence: str


def judge(
    rows: Sequence[tuple[int, int]],
    shift: int,
    again: Callable[[int], Sequence[int]],
    together: int = 1,
) -> Verdict:
    """Find out who was wrong, by what all ranks got that computed it once more.

    Args:
        rows: as in `mismatches`, of which there are some.
        shift: as there.
        again: returns all ranks' digests of the micro-batch of one that is `tried`.
        together: ranks of a group that computes a micro-batch together, and follow each other.
            What one of them gets wrong, others learn of as they compute, so the group is guilty,
            unless nobody else in it came to something else than other groups.
    """
    found = mismatches(rows, shift)
    guilty: dict[int, str] = {}
    for first in tried(found, together):
        digests = again(first)
        for at in range(together):
            producer = first + at
            said = dict(enumerate(digests))
            said = {rank: value for rank, value in said.items() if rank % together == at}
            own = [(producer, rows[producer][0])]
            own += [(e.replayer, rows[e.replayer][1]) for e in found if e.producer == producer]
            guilty = _outvoted(producer, own, said) | guilty
    edges = ", ".join(f"{edge.producer} by {edge.replayer}" for edge in found)
    words = f"micro-batches came out otherwise when computed once more (of rank {edges})"
    if guilty:
        evidence = "; ".join(
            [words, *(guilty[rank] for rank in sorted(guilty)), *_groups(guilty, together)]
        )
        return Verdict(tuple(sorted(guilty)), proven=True, evidence=evidence)
    suspects = dict.fromkeys(rank for edge in found for rank in edge)
    return Verdict(
        tuple(sorted(suspects)),
        proven=False,
        evidence=f"{words}; no majority of ranks agrees on which is right",
    )


def _outvoted(
    producer: int, own: Sequence[tuple[int, int]], again: Mapping[int, int]
) -> dict[int, str]:
    """Return who had or has another digest than most, in words; nobody without a majority.

    Args:
        producer: whose micro-batch it is.
        own: ranks with what they had said of it.
        again: of each rank that has the same part of the model, what it comes to now.
    """
    digests = list(again.values())
    right = max(sorted(set(digests)), key=digests.count)
    if len(digests) < VOTERS_MIN or 2 * digests.count(right) <= len(digests):
        return {}
    return {
        rank: f"rank {rank} has {value:016x} for rank {producer}'s micro-batch, "
        f"{digests.count(right)} of {len(digests)} ranks {right:016x}"
        for rank, value in reversed([*own, *again.items()])
        if value != right
    }


def _groups(guilty: Iterable[int], together: int) -> Iterator[str]:
    """Yield in words which of some ranks compute together, so that one may have misled others."""
    members: dict[int, list[int]] = {}
    for rank in sorted(guilty):
        members.setdefault(rank // together, []).append(rank)
    for group, ranks in members.items():
        if len(ranks) > 1:
            first = group * together
            last = first + together - 1
            yield f"ranks {first} to {last} compute together, and one may mislead the others"
