"""What a run keeps of one thing: a node, a checkpoint, a fault, a request, a budget. Plain data."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

from orchestrator.core.incident import Clock
from orchestrator.core.trust import Verdict
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import (
    Generation,
    IncidentId,
    NodeId,
    Rank,
    Seconds,
    Serial,
    Step,
)
from orchestrator.protocol.messages import StateRepaired, Symptom
from orchestrator.protocol.rank import Speed


@dataclass(slots=True)
class Node:
    """What is known of one node."""

    id: NodeId
    incarnation: int
    joined_at: Seconds
    here_since: Seconds
    """When its present agent joined."""
    lost_at: Seconds = Seconds(0.0)
    """When it was lost, if it is."""
    died_after: Seconds = Seconds(0.0)
    """When it was heard last before it was `reborn`."""
    connected: bool = True
    generation: Generation = Generation(0)
    mark: int = 0
    """How far its ranks have come in `generation` (index into MARKS)."""
    lost: str = ""
    """Evidence that it is gone, and what it ran; "" while it is not."""
    reborn: str = ""
    """Evidence that it is here, and what it ran in this generation is gone; "" while it is not."""
    unusable: str = ""
    """Why it must not be used any more; "" while it may."""
    symptoms: tuple[Symptom, ...] = ()
    """What its hardware says of itself, as its agent told last."""
    unread: tuple[str, ...] = ()
    """Why not all of its hardware is read; none if it is."""
    lacking: tuple[str, ...] = ()
    """What is not installed there that more of it would be read with."""
    finished: bool = False
    devices: tuple[Device, ...] = ()
    """What it is made of, as far as its agent could tell."""
    devices_unknown: str = ""
    """Why that is not all; "" if it is."""
    machine_since: Generation = Generation(0)
    """The generation in which this machine took this name: it took part in later ones only."""

    @property
    def usable(self) -> bool:
        """Whether a generation may be started on it."""
        return self.connected and not self.lost and not self.unusable

    @property
    def serves(self) -> bool:
        """Whether others can fetch what its memory holds, whatever its devices are good for."""
        return self.connected and not self.lost

    def condition(self, seats: Container[NodeId]) -> str:
        """Return its condition in one word."""
        if self.unusable:
            return "Unusable"
        if self.lost:
            return "Lost"
        if not self.connected:
            return "Disconnected"
        return "Training" if self.id in seats else "Spare"


@dataclass(slots=True)
class Committed:
    """A checkpoint that exists on the durable tier."""

    step: Step
    epoch: Generation
    key: str
    at: Seconds
    """When this life knew of it."""
    rejected: str = ""
    """Why it is not to be resumed from: a search passed it over, or a verdict bars it; "" if
    neither did."""
    verdicts: set[Verdict] = field(default_factory=set)
    """What was found about it; of former lives, what was found for it."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What ranks repaired, or did not, and when that was told."""

    at: Seconds
    node: NodeId
    """Whose rank it was; none if it was not repaired."""
    fact: StateRepaired


@dataclass(slots=True)
class Occurrence:
    """One fault with a signature, at one step: in which generations it struck, and where."""

    signature: str
    step: Step
    generations: set[Generation] = field(default_factory=set)
    nodes: set[NodeId] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """A node that is to be free of this run. It is cordoned: as long as that it gets no seat."""

    node: NodeId
    asked_at: Seconds
    by: str
    reason: str
    until: Seconds | None
    """When it will be taken, whatever runs there; None if nobody said."""
    incarnation: int
    """Of its agent, when it was asked for first; 0 if it had none."""
    request: str = ""
    """Names who asked, and when (events.DrainRequested)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A node that may have corrupted the state: nothing is put there until somebody says so."""

    node: NodeId
    since: Seconds
    why: str
    device: Serial = Serial("")
    """Its device whose standing says so, and may say otherwise later; "" if none of it does."""


@dataclass(slots=True, kw_only=True)
class Slow:
    """A rank that is slower than its peers, and what was found out about it."""

    incident: IncidentId
    rank: Rank
    node: NodeId
    incarnation: int
    """Of the node's agent when it was found."""
    generation: Generation
    since: Seconds
    ratio: float
    """Times its peers' time for the same work."""
    share: float
    """Of a step, what all lose by it."""
    clock: Clock
    """By which it is slow."""
    asked_at: Seconds | None = None
    """When it was told to measure itself; None if it was not yet."""
    number: int = 0
    """Of that order."""
    peers: tuple[Rank, ...] = ()
    answers: dict[Rank, Speed] = field(default_factory=dict)
    again: bool = False
    """Whether it is measured for the second time."""
    verdict: str = ""
    """hardware, workload or unknown; "" while it is not known."""
    words: str = ""
    judged_at: Seconds = Seconds(0.0)


@dataclass(slots=True, kw_only=True)
class SlowNetwork:
    """A node whose own network was found to be slow, or that of its buddy."""

    incident: IncidentId
    node: NodeId
    incarnation: int
    """Of its agent when it was found."""
    at: Seconds
    ratio: float
    """Times the usual time that a copy takes."""
    left: bool = False
    """Whether it has given up its seats since: that is done for it once."""


@dataclass(slots=True)
class Budget:
    """Restarts left for faults of one origin."""

    limit: int
    spent: int = 0

    @property
    def left(self) -> int:
        """How many restarts are left."""
        return self.limit - self.spent


class Resize(NamedTuple):
    """A new generation with another number of replicas than the one before."""

    at: Seconds
    incident: IncidentId | None
    """What it was for."""
    before: int
    after: int
    step: Step
    """From which it continued."""
