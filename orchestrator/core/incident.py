"""Findings and incidents: what a detector claims, and what the run makes of it."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

import msgspec

from orchestrator.protocol.ids import Generation, IncidentId, NodeId, Rank, Seconds, Step
from orchestrator.protocol.stacks import Stack

ROW_MIN = 3
"""So many ranks in a row are named by the first and the last of them."""


Clock = Literal["wall", "processor"]
"""What tells how long a rank computes: a wall clock, without what it waits for peers, or the
processor time that it spends. A rank that does not get its core is slow by the first alone."""


class Cause(StrEnum):
    """Whose fault it is. Only HARDWARE and NETWORK may condemn a node."""

    HARDWARE = "hardware"
    NETWORK = "network"
    STORAGE = "storage"
    SOFTWARE = "software"
    NUMERICS = "numerics"
    PREEMPTION = "preemption"
    PLANNED = "planned"
    """Nobody's fault: somebody asked for it."""
    UNKNOWN = "unknown"


BUDGET_OF: dict[Cause, str] = {
    Cause.HARDWARE: "hardware",
    Cause.NETWORK: "hardware",
    Cause.STORAGE: "hardware",
    Cause.UNKNOWN: "hardware",
    Cause.SOFTWARE: "software",
    Cause.NUMERICS: "software",
    Cause.PREEMPTION: "preemption",
}
"""Which budget pays for a restart after an incident of this cause; what is planned costs none."""


HANG = "hang"
"""Kind of a finding that says that ranks stand still, without an error."""
CORRUPTION = "silent-corruption"
"""Kind of a finding that says that state is wrong, and since when."""
REPAIR = "state-repaired"
"""Kind of a finding that says that the state of a rank was wrong, and is right again: nothing that
counts has used it."""
COPIED, REDONE, RECOMPUTED = "repair by copy", "redo of the step", "update computed again"
BY_RANKS = (COPIED, REDONE, RECOMPUTED)
"""The rungs of the ladder below all others: ranks did it by themselves, and nothing was ended."""
GROWTH = "grow-back"
"""Kind of a finding that says that a world can have more replicas again."""
STRAGGLER = "straggler"
"""Kind of a finding that says that a rank is slow: training goes on, and waits for it."""
SLOW_LINK = "slow-link"
"""Kind of a finding that says that the way between two nodes is slow: training goes on."""
UNRESTORABLE = "unrestorable"
"""Kind of a finding that says that what a recovery was to go on from is no good."""
LOST = ("node-lost", "node-silent")
"""Kinds of findings that take a node out of the world."""
Likeness = tuple[str, str, Step]
"""Kind, signature and step of a finding about a node."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A detector's claim, with what it rests on."""

    at: Seconds
    since: Seconds
    """When it began, as far as the evidence says; never after `at`."""
    kind: str
    """crash, exception, node-lost, node-silent, hang, misconfigured, planned, ..."""
    cause: Cause
    ranks: tuple[Rank, ...] = ()
    nodes: tuple[NodeId, ...] = ()
    evidence: str
    step: Step = Step(0)
    generation: Generation | None = None
    """The generation that it is about, if that is over: then it adds to what broke that one."""
    signature: str = ""
    """What two occurrences of the same fault have in common; "" if it has no such mark."""
    around: tuple[NodeId, ...] = ()
    """Where it showed first, if nobody can be named; it accuses none of them."""
    detail: str = ""
    """Long evidence, such as a traceback."""
    rung: str = ""
    """What ranks did about it by themselves; "" if it is for a policy to decide."""
    measure: tuple[float, float] = (0.0, 0.0)
    """Of a straggler: times its peers' time that it takes, and the share of a step that costs. Of a
    slow link: times the usual time, and the share of a step that it costs at most."""
    clock: Clock = "wall"
    """Of a straggler: by which of them it is slow."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A line of an incident's time line."""

    at: Seconds
    text: str


class Incident(msgspec.Struct, kw_only=True):
    """Findings with one cause, and what was done about them. Changed by the controller only."""

    id: IncidentId
    kind: str
    cause: Cause
    generation: Generation
    """The generation that it broke."""
    since: Seconds
    detected_at: Seconds
    findings: list[Finding]
    timeline: list[Note] = []
    rung: str = ""
    """The rung of the recovery ladder that was taken."""
    reason: str = ""
    """Why that one, in words."""
    decided_at: Seconds | None = None
    resumed_at: Seconds | None = None
    """When the first step after it was complete."""
    reached_step: Step = Step(0)
    """The last step completed before it."""
    restored_step: Step | None = None
    restored_from: str = ""
    lost_steps: int = 0
    restarted_as: Generation | None = None
    """The generation that was started because of it, the last one if there were several."""
    reads: dict[str, int] = {}
    """How often the durable tier was asked for anything in order to recover, by who asked."""
    quarantined: tuple[NodeId, ...] = ()
    """Those of its suspects that got no seat any more, sorted."""
    evicted: tuple[NodeId, ...] = ()
    """Nodes that gave their seats to spares for suspicion alone, the most suspected first."""
    asked_until: Seconds | None = None
    """If nodes were asked where their ranks stand (core.inspection): when they have answered."""
    unanswered: set[NodeId] = set()
    """Those that have not answered."""
    places: dict[tuple[str, ...], list[Rank]] = {}
    """Ranks by the functions that they stood in, innermost first, as they were told."""
    unseen: dict[NodeId, str] = {}
    """Nodes that could not say it of all their ranks, and why: the first of them."""

    @property
    def ranks(self) -> tuple[Rank, ...]:
        """Suspected ranks, ascending."""
        return tuple(sorted({rank for finding in self.findings for rank in finding.ranks}))

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Suspected nodes, sorted."""
        return tuple(sorted({node for finding in self.findings for node in finding.nodes}))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Where ranks stood that stood still, the place with the fewest first."""
        found = [Stack(tuple(sorted(ranks)), frames) for frames, ranks in self.places.items()]
        return tuple(sorted(found, key=lambda stack: (len(stack.ranks), stack.ranks)))

    @property
    def open(self) -> bool:
        """Whether training has not resumed yet."""
        return self.resumed_at is None

    def suspects(self) -> str:
        """Return who is suspected, in words."""
        return ", ".join(rank_words(self.ranks) + list(self.nodes)) or "nobody in particular"


def rank_words(ranks: Iterable[Rank]) -> list[str]:
    """Return ranks in words, ascending; of many in a row the first and the last.

    >>> rank_words([Rank(0), Rank(4), Rank(5), Rank(6)])
    ['rank 0', 'ranks 4 to 6']
    """
    who: list[str] = []
    for first, last in _spans(ranks):
        if last - first < ROW_MIN - 1:
            who += [f"rank {rank}" for rank in range(first, last + 1)]
        else:
            who.append(f"ranks {first} to {last}")
    return who


def _spans(ranks: Iterable[Rank]) -> list[tuple[Rank, Rank]]:
    """Return ranks as (first, last) of each unbroken row of them, ascending."""
    spans: list[tuple[Rank, Rank]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], rank)
        else:
            spans.append((rank, rank))
    return spans
