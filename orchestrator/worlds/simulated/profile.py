"""What things take in a simulated cluster, each with where the number comes from.

Reading profiles from files: `profiles.py`. What each constant means in words: docs/profiles.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, log
from typing import Literal

import msgspec
import numpy as np

from orchestrator.faults.model import FaultClass
from orchestrator.faults.quantities import span_s
from orchestrator.worlds.simulated.watching import Origin, Watch

GPUS = 16_384
"""The size for which a profile gives its constants, unless it is scaled."""
Kind = Literal["hardware", "network", "software", "storage", "preemption", "hang", "sdc", "planned"]
"""What befell a job, as far as it matters for finding and for understanding it."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What something takes at one size."""

    gpus: int
    value: float
    """Seconds."""
    origin: Origin
    source: str
    samples: int = 0


class Varies(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """By how much one time differs from the next: a lognormal, which leaves the mean as it is."""

    sigma: float
    """Standard deviation of the logarithm: 0.2 for 95 % between two thirds and one and a half."""
    origin: Origin
    source: str

    def draw(self, chance: np.random.Generator) -> float:
        """Return what a time is multiplied by; 1 on average."""
        return float(np.exp(self.sigma * (chance.standard_normal() - self.sigma / 2)))


class Constant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number, seconds unless its name says otherwise."""

    value: float
    origin: Origin
    source: str
    """Command that measured it, publication that has it, or why it was assumed."""
    samples: int = 0
    """Of how many it is the median; 0 unless it was measured."""
    points: tuple[Point, ...] = ()
    """By ascending size, none smaller than the one before; empty if it does not depend on size."""
    varies: Varies | None = None
    """Of a job, from one time to the next; None if it always takes the same."""

    def drawn(self, chance: np.random.Generator) -> float:
        """Return what it takes this time."""
        return self.value if self.varies is None else self.value * self.varies.draw(chance)

    def at(self, gpus: int) -> Constant:
        """Return the constant of a job of so many GPUs: a power law from point to point.

        Beyond the first and the last point the nearest law goes on, and that is an assumption.
        Between two points the weaker of their origins counts.
        """
        if not self.points:
            return self
        for point in self.points:
            if point.gpus == gpus:
                return self._like(point.value, point.origin, point.source, point.samples)
        law = _nearest(self.points, gpus)
        value = _power_law(law, gpus)
        between = law[0].gpus < gpus < law[1].gpus
        origin = max((point.origin for point in law), key=_WEAKNESS.__getitem__)
        told = "; ".join(f"{point.gpus} GPUs: {point.source}" for point in law)
        words = f"power law {'between' if between else 'beyond'} {told}"
        return self._like(value, origin if between else "assumed", words, 0)

    @classmethod
    def through(cls, points: Sequence[Point], varies: Varies | None = None) -> Constant:
        """Return the constant with these points, two or more; its own value is that at GPUS."""
        first = points[0]
        return cls(first.value, first.origin, first.source, 0, tuple(points), varies).at(GPUS)

    def _like(self, value: float, origin: Origin, source: str, samples: int) -> Constant:
        return Constant(value, origin, source, samples, self.points, self.varies)


_WEAKNESS: dict[Origin, int] = {"measured": 0, "published": 1, "assumed": 2}


def _nearest(points: Sequence[Point], gpus: int) -> tuple[Point, Point]:
    """Return the two points between which a size lies, or the two at its end."""
    for law in pairwise(points):
        if gpus < law[1].gpus:
            return law
    return points[-2], points[-1]


def _power_law(law: tuple[Point, Point], gpus: int) -> float:
    low, high = law
    exponent = log(high.value / low.value) / log(high.gpus / low.gpus)
    return low.value * exp(exponent * log(gpus / low.gpus))


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One property that is no number."""

    value: str
    origin: Origin
    source: str


class Habits(msgspec.Struct, frozen=True, kw_only=True):
    """What a system does, as opposed to how long it takes: for whoever makes a run of it.

    Nothing here is known to the simulated world. An experiment puts it into the run file, or lets
    faults become known accordingly (docs/profiles.md has how).
    """

    notice: Choice
    """own: the controller's detectors find every fault; good, legacy: it becomes known after the
    time in that column of the fault model."""
    detect_within: Constant
    """`detection.detectWithin` of the run: the longest that a standstill goes unnoticed."""
    memory: Constant | None
    """Between two saves to memory; None if there is no such tier."""
    durable: Constant
    """Between two saves to the durable tier."""
    buddies: Choice
    """kept or none: whether another node has a copy of what a node staged."""
    spares: Choice
    """warm: spares have warm processes; cold: they start them when needed; requeue: there are no
    spares, the job goes back to the scheduler, and that takes `requeue` before anything starts."""
    requeue: Constant | None
    detect: Mapping[Kind, Constant]
    """From a fault to its detection, where that is not as `notice` says."""
    localise: Mapping[Kind, Constant]
    """From detection until it is known what to replace or undo, by people or by tools; 0 if
    nothing is here."""
    silent: Watch | None = None
    """What detectors of silent corruption notice; `detect` and `localise` are of what they do not.
    None if there are none."""

    def detect_s(self, fault: FaultClass) -> float | None:
        """Return seconds from a fault until it is known; None to leave that to the detectors."""
        kind = kind_of(fault)
        if kind in self.detect:
            return self.detect[kind].value
        if self.notice.value == "own" or fault.detect is None:
            return None
        detect = fault.detect
        legacy = self.notice.value == "legacy"
        return span_s(detect.legacy if legacy and detect.legacy else detect.good)

    def localise_s(self, fault: FaultClass) -> float:
        """Return seconds from detection until it is known what to do."""
        found = self.localise.get(kind_of(fault))
        return 0.0 if found is None else found.value


def kind_of(fault: FaultClass) -> Kind:
    """Return what a class of faults is to habits."""
    match fault.effect:
        case "hang":
            return "hang"
        case "sdc" | "false-alarm":
            return "sdc"
        case "drain":
            return "planned"
    match fault.cause:
        case "numerics":
            return "sdc"
        case "unknown":
            return "hang"
        case cause:
            return cause


class Profile(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """Everything that takes time. Of a world, the slowest of its nodes counts."""

    name: str
    about: str = ""
    """What it is to be like, in a few sentences."""
    habits: Habits | None = None
    observed: Mapping[str, Constant] = msgspec.field(default_factory=dict)
    """What was measured beside its constants, for who reads them: detection by fault, decisions."""
    order: Constant
    """From a decision until every node has it."""
    exit: Constant
    """From the death of a process until the controller knows."""
    trouble: Constant
    """From a death until the collectives of the others fail."""
    stop: Constant
    """Ranks that live on leave their old world."""
    seat: Constant
    """A process that lives takes its seat."""
    warm: Constant
    """A warm process takes a seat for the first time."""
    rendezvous: Constant
    load: Constant
    """State that lies in a node's memory becomes that of its ranks."""
    fetch: Constant
    """A shard comes from another node's memory."""
    read: Constant
    """A shard comes from the durable tier."""
    first_step: Constant
    """The first step of a generation, the whole of it."""
    step: Constant
    stall: Constant
    """A save keeps training waiting."""
    copy: Constant
    """A staged shard reaches the buddy."""
    write: Constant
    """A staged shard becomes durable."""
    commit: Constant
    search: Constant
    reboot: Constant
    """An agent that died starts again, with warm processes."""
    gone: Constant
    """From the loss of an agent until its world says so; longer than silence, if it never does."""

    def constants(self) -> dict[str, Constant]:
        """Return all constants by name, in the order in which they stand here."""
        named = {name: getattr(self, name) for name in CONSTANTS}
        return {name: value for name, value in named.items() if isinstance(value, Constant)}

    def scaled(self, *, gpus: int) -> Profile:
        """Return the profile of a job of so many GPUs."""
        changed: dict[str, object] = {n: c.at(gpus) for n, c in self.constants().items()}
        if self.habits is not None and self.habits.requeue is not None:
            requeue = self.habits.requeue.at(gpus)
            changed["habits"] = msgspec.structs.replace(self.habits, requeue=requeue)
        return msgspec.structs.replace(self, **changed)


CONSTANTS: dict[str, str] = {
    field.name: field.encode_name
    for field in msgspec.structs.fields(Profile)
    if field.name not in ("name", "about", "habits", "observed")
}
"""Names of the constants of a profile, and how files write them."""
