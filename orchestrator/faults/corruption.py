"""Kinds of silent corruption, by where wrong numbers come from and how often, and their shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from orchestrator.faults.sections import ModelError, Probability, Sourced

CorruptionKind = Literal["state", "persistent", "intermittent", "rare", "oneshot"]
"""state: what replicas hold alike is wrong on one of them, in memory or by its optimizer.
persistent: what a rank computes is wrong in each micro-batch. intermittent: in one of three to one
of ten; rare: in one of a hundred or fewer. oneshot: once, and never again."""
CORRUPTION_KINDS: tuple[CorruptionKind, ...] = get_args(CorruptionKind)
_ROUNDING = 1e-6


class CorruptionShare(Sourced, frozen=True, kw_only=True):
    """How many silent corruptions are of one kind."""

    name: CorruptionKind
    share: Probability


def check(shares: Sequence[CorruptionShare]) -> None:
    """Refuse shares that are not of the whole. None at all say nothing, and are fine.

    Raises:
        ModelError: naming what is there twice, or what they sum to.
    """
    names = [each.name for each in shares]
    for name in names:
        if names.count(name) > 1:
            raise ModelError(f"corruption {name!r} is there twice", "remove one of the two")
    total = sum(each.share for each in shares)
    if shares and abs(total - 1) > _ROUNDING:
        raise ModelError(
            f"shares of corruption sum to {total:g}, expected 1", "what is left out never happens"
        )


def kind_at(shares: Sequence[CorruptionShare], where: float) -> CorruptionKind | None:
    """Return the kind that a number in [0, 1) falls on; None if nothing is known of shares."""
    for each in shares:
        where -= each.share
        if where < 0:
            return each.name
    return shares[-1].name if shares else None
