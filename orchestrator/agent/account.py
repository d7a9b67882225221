"""What a node has to say of the generation it is in, kept until that is over. Pure.

Whatever was said on a connection may have been lost with it, so facts are kept and said again on
the next one; the controller takes repeats. Nothing here asks the time or touches a process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from statistics import median

from orchestrator.protocol.digests import Digests, Taken, column
from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.messages import (
    MARKS,
    DetectorFailed,
    Fact,
    FaultCarriedOut,
    FaultDue,
    Holding,
    LinkTimed,
    NodeAiling,
    NodeUnusable,
    RankExited,
    RankProbed,
    RanksFinished,
    Reached,
    RendezvousOffered,
    ShardsHeld,
    StepReport,
)

FACTS_MAX = 256
"""Facts of one generation that are kept; beyond that the oldest give way."""
REPORTS_MAX = 16_384
PACE = 9
"""Of how many of the newest steps the median is how long one takes."""
DIGESTS_MAX = 512
"""Steps of which digests are kept while there is nobody to send them to."""
CLEARED, SEATED, FORMED = MARKS.index("cleared"), MARKS.index("seated"), MARKS.index("formed")
STEPPED, FINISHED = MARKS.index("stepped"), MARKS.index("finished")
_RANK_MARKS = frozenset(MARKS[FORMED : STEPPED + 1])


class Account:
    """One node's.

    Attributes:
        generation: the newest that this node was told of; 0 for none.
        ranks: ranks seated here in that generation.
        mark: index into MARKS; the least advanced rank counts.
        offered: store address that a rank here offered.
        lanes: per rank that has finished, its part of the state digest.
    """

    def __init__(self) -> None:
        self._standing: dict[Hashable, Fact] = {}
        self.begin(Generation(0), ())

    def begin(self, generation: Generation, ranks: Iterable[Rank]) -> None:
        """Start over: the older generation is no news any more."""
        self.generation = generation
        self.ranks = tuple(ranks)
        self.mark = 0
        self.offered = ""
        self.lanes: dict[Rank, tuple[int, int]] = {}
        self._marks: dict[Rank, int] = {}
        self._facts: dict[Hashable, Fact] = {}
        self._reports: deque[StepReport] = deque(maxlen=REPORTS_MAX)
        self._digests: dict[Taken, dict[Rank, tuple[int, ...]]] = {}
        """That were not sent; whoever compares them can do without, if nobody is there to."""
        self._known = Step(0)
        self._unsent = 0
        """How many of the newest reports have not been sent on this connection."""
        self.stood: dict[Rank, int] = {}
        """Where ranks stood still when it was said on this connection: their signs of life."""

    # Marks --------------------------------------------------------------------------------------

    def advance(self, mark: int) -> Reached | None:
        """Return the fact that this node as a whole has come as far as `mark`, if that is new."""
        if mark <= self.mark:
            return None
        self.mark = mark
        return Reached(generation=self.generation, mark=mark)

    def rank_reached(self, rank: Rank, mark: str) -> Reached | None:
        """Take note of a rank's mark; return the fact that follows, if all ranks are that far."""
        if mark in _RANK_MARKS and rank in self.ranks:
            self._marks[rank] = max(self._marks.get(rank, 0), MARKS.index(mark))
        return self.advance(self._least())

    def rank_finished(
        self, rank: Rank, step: Step, lanes: tuple[int, int]
    ) -> RanksFinished | Reached | None:
        """Take note that a rank is done, and so has reached every mark; return what follows."""
        if rank not in self.ranks:
            return None
        self._marks[rank] = FINISHED
        self.lanes[rank] = lanes
        if self._least() < FINISHED:
            return self.advance(self._least())
        if self.mark == FINISHED:
            return None
        self.mark = FINISHED
        return RanksFinished(
            generation=self.generation,
            step=step,
            ranks=self.ranks,
            lanes=tuple(self.lanes[rank] for rank in self.ranks),
        )

    def has_finished(self, rank: Rank) -> bool:
        """Whether a rank said that it is done."""
        return rank in self.lanes

    def _least(self) -> int:
        return min((self._marks.get(rank, 0) for rank in self.ranks), default=0)

    # Facts --------------------------------------------------------------------------------------

    def keep(self, fact: Fact) -> None:
        """Keep a fact for repetition. What `Joined` carries, or is soon said anew, is not kept."""
        if isinstance(fact, Reached | RendezvousOffered | ShardsHeld | LinkTimed):
            return
        key, standing = _key(fact)
        kept = self._standing if standing else self._facts
        kept.pop(key, None)
        kept[key] = fact
        if len(kept) > FACTS_MAX:
            del kept[next(iter(kept))]

    def fault_answered(self, index: int) -> None:
        """Forget that a fault is due: the controller has answered."""
        self._standing.pop((FaultDue, index), None)

    def facts(self) -> tuple[Fact, ...]:
        """Return what is to be said again on a new connection, in the order it became known."""
        return (*self._standing.values(), *self._facts.values())

    # Steps --------------------------------------------------------------------------------------

    def record(self, reports: Iterable[StepReport]) -> None:
        """Take in completed steps, ascending; what is not beyond the last one is a repeat."""
        for report in reports:
            if not self._reports or report.step > self._reports[-1].step:
                self._reports.append(report)
                self._unsent = min(self._unsent + 1, len(self._reports))

    def reconnected(self, known: Step) -> None:
        """Take note that the controller has the steps up to `known`; all beyond are not sent."""
        self.confirm(known)
        self._unsent = sum(report.step > known for report in self._reports)
        self.stood = {}

    def confirm(self, known: Step) -> None:
        """Take note that the controller has the steps up to `known`."""
        self._known = max(self._known, known)

    def vouched(self, holdings: Iterable[Holding]) -> tuple[Holding, ...]:
        """Return those holdings that may be told before any further step is.

        A state is of use to the controller only if it has every step that led to it: the loss of
        a step that is never computed again would be missing for ever.
        """
        missing = (report.step for report in self._reports if report.step > self._known)
        first = min(missing, default=None)
        return tuple(h for h in holdings if first is None or h.step < first)

    def step_s(self) -> float:
        """Return how long a step takes: the median of the newest ones, 0 before the first."""
        newest = [self._reports[-n].seconds for n in range(1, min(len(self._reports), PACE) + 1)]
        return median(newest) if newest else 0.0

    def unsent(self) -> tuple[StepReport, ...]:
        """Return the reports that have not been sent on this connection; from now on they have."""
        count, self._unsent = self._unsent, 0
        first = len(self._reports) - count
        return tuple(self._reports[index] for index in range(first, len(self._reports)))

    # Digests ------------------------------------------------------------------------------------

    def record_digests(self, rank: Rank, taken: Taken, values: tuple[int, ...]) -> None:
        """Take in what a rank digested at one step."""
        self._digests.setdefault(taken, {})[rank] = values
        if len(self._digests) > DIGESTS_MAX:
            del self._digests[next(iter(self._digests))]

    def unsent_digests(self) -> tuple[Digests, ...]:
        """Return the digests that have not been sent; from now on they have."""
        found, self._digests = self._digests, {}
        return tuple(
            Digests(taken, tuple(rows), tuple(map(column, zip(*rows.values(), strict=True))))
            for taken, rows in found.items()
        )

    def owes_ahead_of(self, fact: Fact) -> bool:
        """Whether there is something to be sent before a fact, which may be the last of a run.

        Reports are always; digests are compared when they come, and none come after the end.
        """
        return self._unsent > 0 or (isinstance(fact, RanksFinished) and bool(self._digests))


def _key(fact: Fact) -> tuple[Hashable, bool]:
    """Return under which key a newer fact replaces it, and whether it outlives its generation."""
    kind = type(fact)
    match fact:
        case FaultDue(index=index) | FaultCarriedOut(index=index):
            return (kind, index), True
        case NodeUnusable() | NodeAiling():
            return kind, True
        case RankExited(pid=pid):
            return (kind, pid), False
        case RankProbed(rank=rank):
            return (kind, rank), False
        case DetectorFailed(ranks=ranks, detector=detector):
            return (kind, ranks, detector), False
        case _:
            return (kind, getattr(fact, "step", None), getattr(fact, "ranks", None)), False
