"""Decides which checkpoints to keep, from their steps and how far they are trusted. Pure.

A silent corruption is found long after it happened, so something must be left from before any
onset, however far back; and not everything can be. Anchors are verified checkpoints that are spaced
ever wider: whenever a corruption began, there is one from before it that is at most a few times as
far back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from storage.verdicts import Trust, Where

LATER = "later than what is kept"
"""Why that stays which needs no other reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """What to keep besides what may never go.

    Attributes:
        last: so many of the newest, at least 1.
        every_steps: every checkpoint whose step is a multiple of this; 0 for none.
        anchors: verified checkpoints at distances from the newest that double.
    """

    last: int
    every_steps: int = 0
    anchors: bool = True

    def __post_init__(self) -> None:
        """Refuse a ladder that keeps nothing.

        Raises:
            ValueError: if `last` is below 1 or `every_steps` below 0.
        """
        if self.last < 1 or self.every_steps < 0:
            raise ValueError(
                f"keep_last is {self.last} and every_steps {self.every_steps}, must be at least "
                "1 and 0"
            )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that could be resumed from."""

    step: int
    epoch: int
    trust: Trust

    @property
    def where(self) -> Where:
        """Step and epoch."""
        return (self.step, self.epoch)


@dataclass(frozen=True, slots=True)
class Kept:
    """Which checkpoints stay.

    Attributes:
        reasons: by step and epoch, the reason that comes first.
        oldest: nothing later than this goes, be it readable or not. Of what is older only that
            stays which has a reason.
    """

    reasons: dict[Where, str]
    oldest: Where


def kept(candidates: Sequence[Candidate], ladder: Ladder, *, restorable: Where) -> Kept:
    """Return which checkpoints stay, and why, in a few words for an operator.

    Besides the ladder: the newest of each level of trust, and whatever has a later step than the
    newest ones and the one that can be restored. Those are steps that an earlier epoch reached, or
    checkpoints that are damaged, which are evidence.

    Args:
        candidates: in any order; none that is barred.
        ladder: what to keep.
        restorable: the newest checkpoint that is known to be whole now.

    """
    ordered = sorted(candidates, key=lambda one: one.where, reverse=True)
    reasons = {one.where: f"of the newest {ladder.last}" for one in ordered[: ladder.last]}
    reasons.setdefault(restorable, "newest that is whole")
    # The running epoch may have gone back to an early step. Its latest commit is where the run is
    # now, however far an earlier epoch had come.
    for one in sorted(ordered, key=lambda one: one.where[::-1])[-1:]:
        reasons.setdefault(one.where, "latest of the newest epoch")
    oldest = min(reasons)
    for one in ordered:
        if one.where > oldest:
            reasons.setdefault(one.where, LATER)
    for level in reversed(Trust):
        for one in [one for one in ordered if one.trust >= level][:1]:
            reasons.setdefault(one.where, f"newest {level.words}")
    for one in ordered:
        if ladder.every_steps and one.step % ladder.every_steps == 0:
            reasons.setdefault(one.where, f"of every {ladder.every_steps} steps")
    if ladder.anchors:
        for one in _anchors(ordered, ladder.last):
            reasons.setdefault(one.where, "anchor")
    return Kept(reasons, oldest)


def _anchors(ordered: Sequence[Candidate], last: int) -> list[Candidate]:
    """Return, of the verified ones, the oldest on each rung.

    Rung k spans the distances from the newest checkpoint of [base * 2^k, base * 2^(k+1)), where
    base is how far back the newest `last` reach. The oldest stays on its rung until it enters the
    next one, and by then a younger one is there to take its place.
    """
    if len(ordered) <= last:
        return []
    newest = ordered[0].step
    base = max(newest - ordered[last - 1].step, 1)
    rungs: dict[int, Candidate] = {}
    for one in ordered:
        distance = newest - one.step
        if distance >= base and one.trust >= Trust.BYTES_VERIFIED:
            rungs[(distance // base).bit_length()] = one
    return list(rungs.values())
