"""What breaks, how often and how badly, as data.

Every rate says where it comes from: `source`, or `assumption` if nobody published it. Reading
files is the business of `orchestrator.compose`; here stand the shapes, and what must fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

import msgspec

from orchestrator.faults import corruption
from orchestrator.faults.cluster import Blast
from orchestrator.faults.corruption import CorruptionShare
from orchestrator.faults.quantities import Entity, Rate, Spread, rate, ratios, span_s, spread
from orchestrator.faults.sections import (
    ClassName,
    ModelError,
    Probability,
    Section,
    Sourced,
    missing,
)
from orchestrator.protocol.runfile import Positive

Effect = Literal[
    "crash",
    "hang",
    "slow",
    "network",
    "sdc",
    "drain",
    "save-fails",
    "worn",
    "false-alarm",
    "preempt",
]
"""What is seen: ranks die; ranks stand still; steps are slower; bandwidth is gone; numbers are
wrong; a planned stop; checkpoints fail; a node works on and wants a reset; a check is wrong; a
node is taken away by its owner."""
Origin = Literal[
    "hardware", "network", "storage", "software", "numerics", "preemption", "planned", "unknown"
]
INTERRUPTS: frozenset[Effect] = frozenset({"crash", "hang", "sdc", "preempt"})
"""Effects that end a generation sooner or later, whether or not they are fatal at once."""


class Detect(Section, frozen=True, kw_only=True):
    """How long it takes to notice: with this project's kind of checks, and without."""

    good: str
    legacy: str | None = None

    def __post_init__(self) -> None:
        span_s(self.good)
        span_s(self.legacy or self.good)


class Notice(Section, frozen=True, kw_only=True):
    """How many are announced, and how long before."""

    share: Probability = 1.0
    span: str

    def __post_init__(self) -> None:
        spread(self.span)

    @property
    def ahead(self) -> Spread:
        """How long before."""
        return spread(self.span)


class FaultClass(Sourced, frozen=True, kw_only=True):
    """One kind of fault. `source` or `assumption` speaks of its rate."""

    name: ClassName
    entity: Entity
    """What breaks; `rate` is per one of them."""
    rate: str | float
    """Such as `6.97e-6 per gpu-hour`; `per job-step` is per optimizer step."""
    blast: Blast
    """What it takes along."""
    effect: Effect
    cause: Origin
    fatal: Probability
    """The share that the job can not go on with; of SDC: that shows by itself."""
    at_start: Probability = 0.0
    """The share of entities that have it when the job starts, besides the rate."""
    slow: float | str = 0.0
    """By which share steps are slower, such as `0.05 to 0.2`; of the whole job if fatal is 0."""
    lasts: str | None = None
    """How long until it ends by itself; without it, until something is done about it."""
    out: str | None = None
    """Which of `repairs` its nodes go through; without it they stay in service."""
    notice: Notice | None = None
    rollback: Probability = 0.0
    """The share after which the newest checkpoint is of no use."""
    detect: Detect | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.entity != self.hazard.entity:
            raise ValueError(f"rate is per {self.hazard.entity}, expected per {self.entity}")
        ratios(self.slow)
        if self.lasts is not None:
            spread(self.lasts)

    @property
    def hazard(self) -> Rate:
        """The rate of one entity."""
        return rate(str(self.rate))

    @property
    def interrupting(self) -> float:
        """The share that interrupts the job without being planned."""
        if self.planned:
            return 0.0
        return 1.0 if self.effect in INTERRUPTS else self.fatal

    def chance_at_start(self, times: float) -> float:
        """Return the probability that an entity has it from the start, multiplied by `times`."""
        return min(self.at_start * times, 1.0)

    @property
    def planned(self) -> bool:
        """Whether it is an operation, not a fault."""
        return self.effect == "drain"


class Part(Section, frozen=True, kw_only=True):
    """One part of a mixture: this share of repairs takes that long."""

    share: Probability
    span: str

    def __post_init__(self) -> None:
        spread(self.span)

    @property
    def spread(self) -> Spread:
        """How long they take."""
        return spread(self.span)


class Repair(Sourced, frozen=True, kw_only=True):
    """How long a node is out of service: a mixture of distributions."""

    name: ClassName
    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1, max_length=16)]
    returns_bad: Probability = 0.0
    """The share of nodes that come back unrepaired; whoever repairs nodes draws it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        total = sum(part.share for part in self.parts)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"shares of parts sum to {total:g}, expected 1")

    @property
    def mean_s(self) -> float:
        """Mean time out of service, seconds."""
        return sum(part.share * part.spread.mean_s for part in self.parts)


class Lemons(Sourced, frozen=True, kw_only=True):
    """Nodes that fail much more often than others. Totals stay what the rates say."""

    share: Probability = 0.0
    """Of nodes."""
    hazard: Annotated[float, msgspec.Meta(ge=1, le=1e4)] = 1.0
    """How many times as often as a normal node, for faults of a GPU, NIC, link or node."""
    after_repair: Annotated[float, msgspec.Meta(ge=1, le=10)] = 1.0
    """Times more often after each repair; whoever repairs nodes applies it."""


class Coincidence(Sourced, frozen=True, kw_only=True):
    """A fault of one node that takes along its neighbours."""

    probability: Probability
    """Per fatal hardware fault of a node."""
    nodes_most: Positive
    """Between one and so many nodes more, all numbers alike."""


class Weibull(Sourced, frozen=True, kw_only=True):
    """Gaps between interruptions are Weibull with this shape, and the same mean."""

    shape: Annotated[float, msgspec.Meta(ge=0.3, le=3)]


class Bursts(Sourced, frozen=True, kw_only=True):
    """Rates are `calm` times the mean, and `bad` times for a while now and then; mean 1."""

    calm: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    bad: Annotated[float, msgspec.Meta(gt=1, le=100)]
    lasts: str
    """How long a bad time is; that of the calm ones between follows from the mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if spread(self.lasts).mean_s <= 0:
            raise ValueError(f"lasts is {self.lasts!r}, expected more than 0 s")

    @property
    def bad_time(self) -> Spread:
        """How long a bad time is."""
        return spread(self.lasts)

    @property
    def calm_mean_s(self) -> float:
        """Mean length of a calm time, so that the mean factor is 1."""
        return self.bad_time.mean_s * (self.bad - 1) / (1 - self.calm)


class Diurnal(Sourced, frozen=True, kw_only=True):
    """Throughput falls and rises once a day; no interruption."""

    amplitude: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    """Between the mean and the least, as a share of the mean."""


class Diagnosis(Sourced, frozen=True, kw_only=True):
    """How good checks are."""

    offline_recall: Probability
    """Of an offline test, for bad GPUs."""
    offline_recall_sdc: Probability
    """The same, for GPUs that corrupt data."""
    false_evictions: Annotated[float, msgspec.Meta(ge=0, le=10)]
    """Healthy nodes taken out per bad one."""
    health_check_every: str

    def __post_init__(self) -> None:
        super().__post_init__()
        span_s(self.health_check_every)


class FaultModel(Section, frozen=True, kw_only=True):
    """A model file."""

    kind: Literal["FaultModel"]
    api_version: Literal["holdfast.dev/v1alpha1"] = "holdfast.dev/v1alpha1"
    name: ClassName
    classes: Annotated[tuple[FaultClass, ...], msgspec.Meta(min_length=1, max_length=256)]
    repairs: Annotated[tuple[Repair, ...], msgspec.Meta(max_length=64)] = ()
    lemons: Lemons | None = None
    coincidence: Coincidence | None = None
    weibull: Weibull | None = None
    bursts: Bursts | None = None
    diurnal: Diurnal | None = None
    diagnosis: Diagnosis | None = None
    corruption: Annotated[tuple[CorruptionShare, ...], msgspec.Meta(max_length=16)] = ()
    """Of which kind silent corruptions are; without it nobody can say what notices them."""

    def checked(self) -> Self:
        """Return the model itself, if its names are there and there once.

        Raises:
            ModelError: naming the first that is not.
        """
        repairs = {repair.name for repair in self.repairs}
        corruption.check(self.corruption)
        _require_once("class", (each.name for each in self.classes))
        _require_once("repair", (each.name for each in self.repairs))
        for index, each in enumerate(self.classes):
            if each.out is not None and each.out not in repairs:
                raise missing(f"classes[{index}] ({each.name})", "repair", each.out, repairs)
        return self

    def class_named(self, name: str) -> FaultClass:
        """Return a class. Raises KeyError if there is none."""
        return self.classes[[each.name for each in self.classes].index(name)]

    def repair_named(self, name: str) -> Repair:
        """Return a repair of a checked model."""
        return self.repairs[[each.name for each in self.repairs].index(name)]


def _require_once(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ModelError(f"{what} {name!r} is there twice", "rename or remove one of the two")
        seen.add(name)
