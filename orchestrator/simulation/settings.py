"""What an experiment is: a cluster, what befalls it, and how it is looked after. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Annotated, Literal, Self

import msgspec

from orchestrator.faults.arrivals import Clock
from orchestrator.faults.cluster import Cluster
from orchestrator.faults.model import FaultModel
from orchestrator.faults.quantities import span_s
from orchestrator.faults.record import FaultRecord
from orchestrator.faults.sections import missing
from orchestrator.policy.arithmetic import DAY_S
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import DETECT_WITHIN_MAX_S
from orchestrator.worlds.simulated.profile import Profile
from orchestrator.worlds.simulated.watching import Detectors

RANKS_PER_NODE = 8
GPUS_MAX = 131_072
DAYS_MAX = 3_660.0
REPLICAS_MOST = 8
"""Copies of the whole state by HSDP, where the nodes can be divided so: 2,048 shards at 16,384."""
BUDGET = 1_000_000
"""Restarts: an experiment asks what a policy costs, not when somebody would have given up."""
STEPS_TIMES = 4
"""How many times as many steps a run has as fit into the days: it is stopped, and never done."""
MEMORY_S, DURABLE_S, DETECT_WITHIN_S = 30.0, 600.0, 10.0
"""Where a profile has no habits: near Daly's best at 16,384 GPUs; a usual interval; our default."""
MICRO_BATCHES = 16
"""That a GPU takes in a step: Llama 3 had a batch of 16 per data-parallel group at 16,384 GPUs
(arXiv 2407.21783, Table 4). They are what fewer replicas share out anew."""
LEAST_SHARE = 0.5
"""Of the replicas, with how few the run goes on: see docs/adr/0012."""
WARMUP_S = 600.0
KEEP_LAST = 3
SPAN_LEAST_S = 0.001
Factor = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class SettingsError(ValueError):
    """An experiment can not be as it was asked for.

    Attributes:
        hint: what to change.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[type[SettingsError], tuple[str, str]]:
        """Have another process raise it here as it was."""
        return type(self), (str(self), self.hint)


class Settings(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """One experiment; together with a seed it says everything."""

    gpus: Annotated[int, msgspec.Meta(ge=RANKS_PER_NODE, le=GPUS_MAX)] = 16_384
    """Of the job, 8 to a node."""
    days: Annotated[float, msgspec.Meta(gt=0, le=DAYS_MAX)] = 54.0
    """Length of the run, days."""
    model: str = "llama3"
    """A fault model that comes with holdfast, or the file of another."""
    record: str | None = None
    """What did happen, to happen again: `llama3`, or a file. Default: draw from the model."""
    scale_record: bool = True
    """Whether a record of another size or length is scaled to this one."""
    background: bool = True
    """Whether with a record comes what no record counts: slow nodes, congestion, full storage."""
    clock: Clock = "poisson"
    """How faults come that are drawn: poisson, weibull or bursty."""
    rates: Factor = 1.0
    """All rates of the model are multiplied by it."""
    class_rates: dict[str, Factor] = {}
    """The rates of these classes as well; 0 switches one off."""
    repair: Annotated[float, msgspec.Meta(ge=0, le=1e3)] = 1.0
    """All times out of service are multiplied by it."""
    profile: str = "measured"
    """What things take: one that comes with holdfast, or the file of another."""
    spares: Annotated[int, msgspec.Meta(ge=0, le=GPUS_MAX // RANKS_PER_NODE)] | None = None
    """Hot spare nodes; default enough from the first day to the last in nine runs of ten, by the
    model's repairs."""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=GPUS_MAX)] | None = None
    """Data-parallel replicas with a whole state each; default up to 8."""
    save_every: str | None = None
    """Between two saves to memory; default as the profile has it."""
    durable_every: str | None = None
    """Between two saves to the durable tier; default as the profile has it."""
    cadence: Literal["steps", "auto"] = "steps"
    """`checkpoint.every` of the run file: with `auto`, the run saves at first as often as the two
    above say, and then as often as it finds best."""
    detect_within: str | None = None
    """`detection.detectWithin` of the run file, from which all its timeouts follow; default as the
    profile has it."""
    poison_after: str | None = None
    """A bug of the job's own: the step that is reached after so much training fails wherever it
    runs; default none."""
    watch: Detectors | None = None
    """Which detectors of silent corruption watch the job: `none`, `digests` of state that replicas
    hold alike, or `both`, with the ring replay; default as the profile has it."""
    false_alarms: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Of these detectors, per step: each names a healthy node as if it were proven. None by
    default; what may be is in docs/evidence/months.md."""
    off: tuple[str, ...] = ()
    """Policies to do without: `recovery.disable` of the run file."""

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return self.gpus // RANKS_PER_NODE

    @property
    def cluster(self) -> Cluster:
        """The job's own part of the cluster, where faults strike."""
        return Cluster(gpus=self.gpus, gpus_per_node=RANKS_PER_NODE)

    @property
    def horizon_s(self) -> float:
        """Length of the run, seconds."""
        return self.days * DAY_S

    def checked(self, model: FaultModel, record: FaultRecord | None) -> Self:
        """Return the settings, if their parts fit together.

        Raises:
            SettingsError: naming the first that does not.
            ModelError: if the model has no such class.
        """
        if self.gpus % RANKS_PER_NODE:
            raise SettingsError(
                f"gpus is {self.gpus}, expected a multiple of {RANKS_PER_NODE}",
                "whole nodes of 8 GPUs",
            )
        for name in ("save_every", "durable_every", "detect_within", "poison_after"):
            if (given := getattr(self, name)) is not None:
                _span(camel(name), given)
        if self.replicas is not None and (self.gpus % self.replicas):
            raise SettingsError(
                f"replicas is {self.replicas}, expected a divisor of {self.gpus} GPUs",
                "a power of two that is at most as large",
            )
        known = [each.name for each in model.classes]
        for name in self.class_rates:
            if name not in known:
                raise missing(f"model {model.name!r}", "class", name, known)
        if record is not None:
            self._fits_record(record)
        return self

    def _fits_record(self, record: FaultRecord) -> None:
        for name, value, usual in (
            ("rates", self.rates, 1.0),
            ("classRates", self.class_rates, {}),
            ("clock", self.clock, "poisson"),
        ):
            if value != usual:
                raise SettingsError(
                    f"{name} is {value}, and record {record.name!r} has counts, not rates",
                    "leave the record out to draw from the model",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Care:
    """How a run is looked after: what the settings say, else the habits of the profile."""

    memory_s: float | None
    """Between two saves to memory; None if there is no such tier."""
    durable_s: float
    detect_within_s: float
    spares: int
    keep_last: int
    """Checkpoints on the durable tier: one of them is older than what anybody has to undo."""

    @property
    def forgets(self) -> bool:
        """Whether nothing is kept in memory."""
        return self.memory_s is None


def care(settings: Settings, profile: Profile, *, spares: int, undone_s: float) -> Care:
    """Return how a run is looked after.

    Args:
        settings: what was asked for.
        profile: whose habits fill in the rest.
        spares: hot spare nodes, if the profile's system has such.
        undone_s: the longest time for which steps may turn out to be wrong.
    """
    habits = profile.habits
    memory_s, durable_s, detect_s = MEMORY_S, DURABLE_S, DETECT_WITHIN_S
    keeps = True
    if habits is not None:
        keeps = habits.memory is not None
        memory_s = habits.memory.value if habits.memory is not None else memory_s
        durable_s, detect_s = habits.durable.value, habits.detect_within.value
        if habits.notice.value != "own":
            # Faults become known as the profile says; our own detectors are not to be quicker.
            detect_s = DETECT_WITHIN_MAX_S
        spares = 0 if habits.requeue is not None else spares
    memory_s = _given(settings.save_every, memory_s)
    durable_s = _given(settings.durable_every, durable_s)
    keeps = keeps or settings.save_every is not None
    return Care(
        memory_s=memory_s if keeps else None,
        durable_s=durable_s,
        detect_within_s=_given(settings.detect_within, detect_s),
        spares=spares,
        keep_last=KEEP_LAST + ceil(undone_s / durable_s),
    )


def run_file(settings: Settings, profile: Profile, looks: Care) -> TrainingRun:
    """Return the run file of an experiment: what the controller is asked to look after."""
    step_s = profile.step.value
    memory_every = max(round((looks.memory_s or looks.durable_s) / step_s), 1)
    durable_every = memory_every * max(round(looks.durable_s / (memory_every * step_s)), 1)
    replicas = settings.replicas or _replicas(settings.gpus)
    hours = ceil(settings.days * 24) + 1
    # What nobody has seen yet may take as long as the slowest thing there is, and then some.
    slowest_s = max(constant.value for constant in profile.constants().values())
    return msgspec.convert(
        {
            "apiVersion": "holdfast.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": "simulated"},
            "spec": {
                "nodes": {
                    "count": settings.nodes,
                    "ranksPerNode": RANKS_PER_NODE,
                    "spares": looks.spares,
                },
                "parallelism": {"dpReplicate": replicas},
                "trainer": {
                    "steps": ceil(STEPS_TIMES * settings.horizon_s / step_s) + 1,
                    "globalBatch": MICRO_BATCHES * settings.gpus,
                    "microBatch": 1,
                },
                "checkpoint": {
                    "every": settings.cadence,
                    "everySteps": durable_every,
                    "memoryEverySteps": memory_every,
                    "keepLast": looks.keep_last,
                },
                "detection": {
                    "detectWithin": f"{looks.detect_within_s:.3f}s",
                    "warmupLimit": f"{max(WARMUP_S, 3 * slowest_s):.0f}s",
                },
                "recovery": {
                    "hardwareBudget": BUDGET,
                    "softwareBudget": BUDGET,
                    "preemptionBudget": BUDGET,
                    # Nobody gives up: waiting for nodes is what an experiment may be about.
                    "spareWait": f"{hours}h",
                    "minReplicas": ceil(LEAST_SHARE * replicas),
                    "disable": list(settings.off),
                },
            },
        },
        TrainingRun,
    )


def _given(text: str | None, otherwise_s: float) -> float:
    return otherwise_s if text is None else span_s(text)


def _replicas(gpus: int) -> int:
    nodes = gpus // RANKS_PER_NODE
    return max(d for d in range(1, REPLICAS_MOST + 1) if nodes % d == 0)


def _span(name: str, text: str) -> None:
    try:
        value_s = span_s(text)
    except ValueError as error:
        raise SettingsError(f"{name}: {error}", "write for example `30s`") from error
    if value_s < SPAN_LEAST_S:
        raise SettingsError(
            f"{name} is {text}, expected at least {SPAN_LEAST_S * 1e3:g}ms", "for example `30s`"
        )


def camel(name: str) -> str:
    """Return the name of a field as files have it."""
    first, *others = name.split("_")
    return first + "".join(other.title() for other in others)
