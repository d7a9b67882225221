"""Compares the digests of ranks that hold the same shard: the majority names who holds another.

Nobody is named without a majority: of two that differ, either may be wrong (group suspect).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.protocol.digests import HEX_DIGITS, KINDS, SHARED, Kind, Taken
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import StateDiverged

VOTERS_MIN = 3
"""With fewer there is no majority that means anything."""
GUARD_SHARE = 0.01
"""Of the nodes of a world, that one comparison proves guilty at most, but for one node: of more,
what digests them is as likely to be at fault. Source: reference targets, no more than 1 % of a
fleet leaves in a day on a single evidence."""
NAMED_MAX = 4
"""Ranks, votes or digests that evidence names one by one."""
EVIDENCE_MAX = 2000
"""Characters of evidence: as many as an agent tells."""

_WORDS = 1 << 64
Votes = npt.NDArray[np.uint64]


class Dissent(NamedTuple):
    """One shard, of which not all who hold it have the same."""

    kind: Kind
    shard: int
    votes: tuple[tuple[int, tuple[Rank, ...]], ...]
    """Each digest with who has it, the most frequent first; then by rank."""

    @property
    def outvoted(self) -> tuple[Rank, ...]:
        """Who has not what the majority has; nobody if there is none."""
        voters = sum(len(ranks) for _, ranks in self.votes)
        if voters < VOTERS_MIN or 2 * len(self.votes[0][1]) <= voters:
            return ()
        return tuple(sorted(rank for _, ranks in self.votes[1:] for rank in ranks))

    @property
    def voters(self) -> tuple[Rank, ...]:
        """Who holds it."""
        return tuple(sorted(rank for _, ranks in self.votes for rank in ranks))


def dissents(votes: dict[Kind, Votes], layout: Layout) -> list[Dissent]:
    """Return every shard on which its holders differ.

    Args:
        votes: of each kind, the digest of every rank of the world; 0 for one that is not known.
        layout: how the world is cut.
    """
    shards = layout.shards()
    first = np.array([layout.rank_of(shard) for shard in range(layout.shard_count)])
    found = []
    for kind in SHARED:
        values = votes.get(kind)
        # Nearly always each is what the first holder of its shard has: looked at all at once.
        if values is None or np.array_equal(values, values[first][shards]):
            continue
        for shard in range(layout.shard_count):
            holders: dict[int, list[Rank]] = {}
            for rank in np.flatnonzero((shards == shard) & (values != 0)).tolist():
                holders.setdefault(int(values[rank]), []).append(Rank(rank))
            if len(holders) > 1:
                ranked = sorted(holders.items(), key=lambda vote: (-len(vote[1]), vote[1]))
                found.append(Dissent(kind, shard, tuple((v, tuple(r)) for v, r in ranked)))
    return found


def verdict(
    found: Sequence[Dissent], taken: Taken, generation: Generation, seats: Sequence[NodeId]
) -> StateDiverged:
    """Return what follows from dissents, of which there are some, at one step.

    The state before `taken.step` showed it. Each piece of it was last compared `period` steps
    before, so what that step was given is the last that was seen to be good. A step's gradient is
    wrong since that step.
    """
    assert found
    outvoted = dict.fromkeys(rank for one in found for rank in one.outvoted)
    unclear = dict.fromkeys(r for one in found if not one.outvoted for r in one.voters)
    guilty = dict.fromkeys(seats[rank] for rank in outvoted)
    guarded = len(guilty) > max(1, int(len(set(seats)) * GUARD_SHARE))
    nodes = guilty or dict.fromkeys(seats[rank] for rank in unclear)
    evidence = "; ".join(map(_words, found[:NAMED_MAX]))
    if len(found) > NAMED_MAX:
        evidence += f"; and so {len(found) - NAMED_MAX} more"
    if guarded:
        evidence += (
            f"; {len(guilty)} nodes were outvoted at once, which rather speaks against what "
            "digests them: none is proven guilty"
        )
    elif not guilty:
        evidence += "; no majority, so nobody can say who is right"
    back = 1 if all(one.kind == "gradient" for one in found) else taken.period + 1
    return StateDiverged(
        generation=generation,
        step=Step(taken.step - 1),
        since=Step(max(taken.step - back, 0)),
        nodes=tuple(nodes),
        ranks=tuple(outvoted or unclear),
        evidence=f"before step {taken.step} moved the weights, {evidence}"[:EVIDENCE_MAX],
        proven=bool(guilty) and not guarded,
    )


def _words(one: Dissent) -> str:
    votes = [f"{v:0{HEX_DIGITS}x} by {_ranks(ranks)}" for v, ranks in one.votes[:NAMED_MAX]]
    if len(one.votes) > NAMED_MAX:
        votes.append(f"and {len(one.votes) - NAMED_MAX} more")
    return f"{one.kind} of shard {one.shard} had {len(one.votes)} digests: {', '.join(votes)}"


def _ranks(ranks: Sequence[Rank]) -> str:
    if len(ranks) > NAMED_MAX:
        return f"{len(ranks)} ranks"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def parts_of_world(votes: dict[Kind, Votes], layout: Layout) -> str:
    """Return two sums of each shared kind, in hex, by which two computations of a step compare.

    The first is of the digests of all shards; in the second, each counts as many times as its place
    among them says, from 1 on. So what differs in one shard alone tells which (`parting`). 0 stands
    for a kind that was not taken; "" for all, if one shard's digest of a kind is unknown.
    """
    first = [layout.rank_of(shard) for shard in range(layout.shard_count)]
    places = np.arange(1, len(first) + 1, dtype=np.uint64)
    sums: list[int] = []
    for kind in SHARED:
        values = votes[kind][first] if kind in votes else np.zeros_like(places)
        if kind in votes and not values.all():
            return ""
        sums += [int(values.sum(dtype=np.uint64)), int((values * places).sum(dtype=np.uint64))]
    return "".join(f"{each:0{HEX_DIGITS}x}" for each in sums)


def parting(one: str, other: str, layout: Layout) -> dict[Kind, tuple[int, ...]]:
    """Return in what two computations of a step differ: by kind, in which shards.

    Args:
        one: what `parts_of_world` returned.
        other: of the other computation, cut in the same way.
        layout: of both.

    Returns:
        Of each kind that differs, its shard, if it is one alone, or none, if it is not known to be.
        A kind that one of them did not take does not differ.
    """
    found: dict[Kind, tuple[int, ...]] = {}
    for place, kind in enumerate(SHARED):
        (a, placed_a), (b, placed_b) = _sums(one, place), _sums(other, place)
        if (a, placed_a) == (b, placed_b) or not (placed_a and placed_b):
            continue
        by, placed = (a - b) % _WORDS, (placed_a - placed_b) % _WORDS
        shards = range(layout.shard_count)
        alone = [shard for shard in shards if by and (shard + 1) * by % _WORDS == placed]
        found[kind] = tuple(alone) if len(alone) == 1 else ()
    return found


def _sums(parts: str, place: int) -> tuple[int, int]:
    at = 2 * HEX_DIGITS * place
    return int(parts[at : at + HEX_DIGITS], 16), int(parts[at + HEX_DIGITS :][:HEX_DIGITS], 16)


def of_world(votes: dict[Kind, Votes], layout: Layout) -> str:
    """Return the digest of the whole state, of which each shard counts once; "" if one is unknown.

    Sums do not care how the state is cut: worlds of other sizes have the same.
    """
    first = [layout.rank_of(shard) for shard in range(layout.shard_count)]
    total = 0
    for kind in KINDS:
        if kind not in SHARED or kind not in votes:
            continue
        values = votes[kind][first]
        if not values.all():
            return ""
        total += sum(values.tolist())
    return f"{total % _WORDS:0{HEX_DIGITS}x}"
