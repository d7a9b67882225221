"""Says who was wrong, from what ranks came to that computed the same micro-batches.

Ranks of a group compute a micro-batch together: some abreast, who meet in every layer (tp, cp), and
some one after the other (pp). What one gets wrong, those after it take over, and on the way back so
do those before it. So ranks tell what they came to link by link, in the order in which one follows
from the other; whoever has another link than most, and had none before it, was wrong first.

Places: ranks in the order of their groups, and within a group in one order for all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from orchestrator.protocol.layout import Layout

VOTERS_MIN = 3
TRIED_MAX = 3
"""Micro-batches that all ranks compute once more to find out who was wrong."""
SHOWN_MAX = 6
LINKS = ("received", "sent on", "received back", "sent back, gradient, or product")
"""Of a stage of a pipeline: what a rank digests of a micro-batch."""

Digests: TypeAlias = Sequence[int]
"""Of what one rank came to, in its links' order."""


class Chain(NamedTuple):
    """How ranks follow from each other that compute a micro-batch.

    Attributes:
        ranks: the rank at each place.
        abreast: so many members of a group that follow each other meet in every layer.
        links: of each member of a group, when each of its digests came to be: links with the same
            number at the same time, and even ones of what came from others.
    """

    ranks: Sequence[int]
    abreast: int
    links: Sequence[Sequence[int]]

    @classmethod
    def of(cls, layout: Layout, stages_each: int = 1) -> Chain:
        """Return that of a layout whose ranks have so many stages each.

        >>> Chain.of(Layout(dp_replicate=2, pp=2)).links
        [[0, 1, 6, 7], [2, 3, 4, 5]]
        """

        def place(rank: int) -> tuple[int, ...]:
            at = layout.position(rank)
            return at.dp_replicate, at.dp_shard, at.pp, at.cp, at.tp

        ranks = sorted(range(layout.world_size), key=place)
        links = [_links(member, layout.pp, stages_each) for member in range(layout.pp)]
        abreast = layout.cp * layout.tp
        return cls(ranks, abreast, [each for each in links for _ in range(abreast)])

    @property
    def together(self) -> int:
        """Ranks of a group."""
        return len(self.links)


def _links(member: int, pp: int, stages_each: int) -> list[int]:
    if pp == 1:
        return [1]
    count = pp * stages_each
    found = []
    for stage in range(member, count, pp):
        back = 2 * count + 2 * (count - 1 - stage)
        found += [2 * stage, 2 * stage + 1, back, back + 1]
    return found


class Mismatch(NamedTuple):
    """A micro-batch that came out differently, by places."""

    producer: int
    """Whose it was."""
    replayer: int
    """Who computed it once more."""


def mismatches(rows: Sequence[tuple[Digests, Digests]], shift: int) -> list[Mismatch]:
    """Return what came out differently.

    Args:
        rows: by place, the digests of its own micro-batch and of the one that it computed for the
            place `shift` further on.
        shift: see there.
    """
    return [
        Mismatch((place + shift) % len(rows), place)
        for place, (_, replayed) in enumerate(rows)
        if tuple(replayed) != tuple(rows[(place + shift) % len(rows)][0])
    ]


def tried(found: Sequence[Mismatch], together: int = 1) -> list[int]:
    """Return whose micro-batches all ranks compute once more; of a group, the first is named.

    Args:
        found: what came out differently.
        together: ranks of a group.
    """
    return list(dict.fromkeys(edge.producer // together * together for edge in found))[:TRIED_MAX]


class Verdict(NamedTuple):
    """Who computes wrongly, as far as can be said."""

    ranks: tuple[int, ...]
    proven: bool
    evidence: str
    of_data: bool = False
    """Whether it is what they are given to read, and not what they compute on."""
    divided: bool = False
    """Whether no majority agrees on what is right: one that is wrong would have left one."""
    same: bool = False
    """Whether one of them came to the same when it computed that once more."""


def judge(
    rows: Sequence[tuple[Digests, Digests]],
    shift: int,
    again: Callable[[int], Sequence[Digests]],
    chain: Chain,
    *,
    how: str = "computed",
) -> Verdict:
    """Find out who was wrong, by what all ranks got that computed it once more.

    Args:
        rows: as in `mismatches`, of which there are some.
        shift: as there.
        again: returns by place what all came to for the micro-batch of one that is `tried`.
        chain: how they follow from each other. Of those abreast one may mislead the others, so all
            of them are guilty that have another link at that time.
        how: the word for what was done once more.
    """
    found = mismatches(rows, shift)
    guilty: dict[int, str] = {}
    torn: dict[int, str] = {}
    same: set[int] = set()
    for first in tried(found, chain.together):
        members = range(first, first + chain.together)
        computed = again(first)
        own = [(place, rows[place][0]) for place in members]
        replayed = [((p - shift) % len(rows), rows[(p - shift) % len(rows)][1]) for p in members]
        groups = [list(enumerate(computed))[at.start : at.stop] for at in _groups(rows, chain)]
        for telling in (own, replayed, *groups):
            time, accused = _outvoted(chain, chain.ranks[first], telling, computed)
            if telling is own or telling is replayed:
                so = [place for place, said in telling if tuple(said) == tuple(computed[place])]
                same |= {chain.ranks[place] for place in so} & accused.keys()
            for rank, words in accused.items():
                (guilty if time % 2 else torn).setdefault(rank, words)
    words = f"micro-batches came out otherwise when {how} once more ({shown(found, chain)})"
    if guilty:
        evidence = "; ".join(
            [words, *(guilty[r] for r in sorted(guilty)), *_abreast(guilty, chain)]
        )
        ranks = tuple(sorted(guilty))
        return Verdict(ranks, proven=True, evidence=evidence, same=bool(same & guilty.keys()))
    if torn:
        evidence = "; ".join([words, *(torn[rank] for rank in sorted(torn))])
        return Verdict(tuple(sorted(torn)), proven=False, evidence=evidence)
    return Verdict(
        tuple(sorted(chain.ranks[place] for place in _first_to_differ(rows, found, chain))),
        proven=False,
        evidence=f"{words}; no majority of ranks agrees on which is right",
        divided=True,
    )


def _groups(rows: Sequence[object], chain: Chain) -> Iterator[range]:
    for first in range(0, len(rows), chain.together):
        yield range(first, first + chain.together)


def _outvoted(
    chain: Chain,
    producer: int,
    telling: Sequence[tuple[int, Digests]],
    computed: Sequence[Digests],
) -> tuple[int, dict[int, str]]:
    """Return when a group first had something else than most, and who of it, in words.

    Nobody without a majority for every link: what is no evidence may lie before what looks like it.

    Args:
        chain: of the ranks.
        producer: the first rank whose micro-batch it is.
        telling: places of the group with what they say.
        computed: what all places came to now.
    """
    wrong: list[tuple[int, int, str]] = []
    for member, (place, said) in enumerate(telling):
        others = computed[member :: chain.together]
        for link, time in enumerate(chain.links[member]):
            values = [each[link] for each in others]
            right = max(sorted(set(values)), key=values.count)
            count = values.count(right)
            if len(values) < VOTERS_MIN or 2 * count <= len(values):
                return 0, {}
            if said[link] != right:
                rank = chain.ranks[place]
                what = f" in what it {LINKS[link % len(LINKS)]}" if len(said) > 1 else ""
                words = (
                    f"rank {rank} has {said[link]:016x}{what} for rank {producer}'s micro-batch, "
                    f"{count} of {len(values)} ranks {right:016x}"
                )
                wrong.append((time, rank, words))
    first = min((time for time, _, _ in wrong), default=0)
    return first, {rank: words for time, rank, words in wrong if time == first}


def _first_to_differ(
    rows: Sequence[tuple[Digests, Digests]], found: Iterable[Mismatch], chain: Chain
) -> set[int]:
    """Return the places of both sides of every pair of groups, where they begin to differ."""
    begun: dict[tuple[int, int], tuple[int, set[int]]] = {}
    for producer, replayer in found:
        times = chain.links[producer % chain.together]
        pairs = zip(times, rows[producer][0], rows[replayer][1], strict=True)
        time = min(time for time, one, other in pairs if one != other)
        groups = producer // chain.together, replayer // chain.together
        first, places = begun.setdefault(groups, (time, set()))
        if time < first:
            begun[groups] = first, places = time, set()
        if time == first:
            places |= {producer, replayer}
    return {place for _, places in begun.values() for place in places}


def shown(found: Sequence[Mismatch], chain: Chain) -> str:
    """Return in words whose micro-batches came out otherwise, and where."""
    edges = [f"{chain.ranks[edge.producer]} by {chain.ranks[edge.replayer]}" for edge in found]
    more = [f"{len(edges) - SHOWN_MAX} more"] if len(edges) > SHOWN_MAX else []
    return f"of rank {', '.join([*edges[:SHOWN_MAX], *more])}"


def _abreast(guilty: Iterable[int], chain: Chain) -> Iterator[str]:
    """Yield in words which of some ranks compute abreast, so that one may have misled others."""
    blocks: dict[int, list[int]] = {}
    for place, rank in enumerate(chain.ranks):
        blocks.setdefault(place // chain.abreast, []).append(rank)
    accused = set(guilty)
    for ranks in blocks.values():
        if len(accused.intersection(ranks)) > 1:
            yield (
                f"ranks {ranks[0]} to {ranks[-1]} compute together, and one may mislead the others"
            )
