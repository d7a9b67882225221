"""Draws the faults of a run, from rates or from a record, with a seed.

Every class draws from a stream of its own: switching one off leaves the others as they were, so
that two experiments differ by what was changed and not by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from orchestrator.faults import arrivals
from orchestrator.faults.arrivals import Clock, Weather
from orchestrator.faults.cluster import Cluster, Places
from orchestrator.faults.model import FaultClass, FaultModel, Repair
from orchestrator.faults.places import Strike, strike
from orchestrator.faults.quantities import Floats, ratios, spread
from orchestrator.faults.record import FaultRecord
from orchestrator.faults.schedule import Columns, Flags, Schedule, joined
from orchestrator.faults.sections import ModelError, missing

DAY_S = 86_400.0
FAULTS_MAX = 4_000_000
"""Some 300 MB of columns; 131,072 GPUs have 0.7 million in 54 days, nearly all of them flaps."""
STEP_S = 6.5
"""For what comes per step: Llama 3 405B, 16.8M tokens on 16,384 GPUs at 400 TFLOPs: 6.2 to 6.8."""
NONE: Mapping[str, float] = {}


def draw(  # noqa: PLR0913 - each is one knob of an experiment
    model: FaultModel,
    cluster: Cluster,
    *,
    days: float,
    rng: np.random.Generator,
    clock: Clock = "poisson",
    factor: float = 1.0,
    factors: Mapping[str, float] = NONE,
    step_s: float = STEP_S,
) -> Schedule:
    """Draw faults at the rates of a model.

    Args:
        model: a checked model.
        cluster: hardware rates scale with its entities; those of the job do not.
        days: length of the run.
        rng: must be able to spawn, as generators with a seed are.
        clock: how those that interrupt the job come; the mean rate is the same.
        factor: all rates are multiplied by it.
        factors: the rates of these classes as well; 0 switches one off.
        step_s: seconds of a step, for rates per step.

    Raises:
        ModelError: if a class is not there, the model lacks what the clock needs, or there would
            be more faults than memory is meant for.
    """
    _require_classes(model, factors)
    scale = [factor * factors.get(each.name, 1.0) for each in model.classes]
    drawing = _drawing(model, cluster, days, rng)
    means = drawing.means(scale, step_s)
    drawing.require_room(means, scale)
    moments = drawing.moments(means, clock)
    return drawing.schedule(moments, [drawing.at_start(k, n) for k, n in enumerate(scale)])


def replay(  # noqa: PLR0913 - each is one knob of an experiment
    record: FaultRecord,
    model: FaultModel,
    cluster: Cluster,
    *,
    days: float,
    rng: np.random.Generator,
    scaled: bool = False,
    background: bool = False,
    step_s: float = STEP_S,
) -> Schedule:
    """Let a record happen again: its counts exactly, at moments and places that are drawn.

    Args:
        record: a record, checked against the model.
        model: what its classes are.
        cluster: where; places are seats of the job, since the record counts what hit the job.
        days: length of the run.
        rng: must be able to spawn, as generators with a seed are.
        scaled: multiply counts by the days, and those of hardware by the GPUs, relative to the
            record's; the total is exact to half a fault.
        background: draw from the model besides what no record counts, since it does not
            interrupt: flaps, slow nodes, congestion, storage that stalls.
        step_s: seconds of a step, for rates per step.

    Raises:
        ModelError: if there are more faults of nodes than nodes.
    """
    counts = fitting_counts(record, model, cluster, days=days, scaled=scaled)
    scale = [float(background and not e.interrupting and not e.planned) for e in model.classes]
    drawing = _drawing(model, cluster, days, rng)
    means = drawing.means(scale, step_s)
    drawing.require_room([*means, *counts.values()], scale)
    moments = [
        np.concatenate((moments, stream.uniform(0, drawing.window_s, counts.get(each.name, 0))))
        for each, moments, stream in zip(
            model.classes, drawing.moments(means, "poisson"), drawing.streams, strict=True
        )
    ]
    begins = [drawing.at_start(kind, times) for kind, times in enumerate(scale)]
    return drawing.schedule(moments, begins, recorded=frozenset(counts))


def fitting_counts(
    record: FaultRecord, model: FaultModel, cluster: Cluster, *, days: float, scaled: bool
) -> Mapping[str, int]:
    """Return how often each class of a record happens again. Raises ModelError as `replay` does."""
    counts = scaled_counts(record, model, cluster, days) if scaled else record.counts
    hint = (
        "choose fewer days or more GPUs, or have faults drawn by rates, without a record"
        if scaled
        else "have the record scaled to the cluster, or use one of its size"
    )
    _require_nodes(record, counts, model, cluster, hint)
    return counts


def scaled_counts(
    record: FaultRecord, model: FaultModel, cluster: Cluster, days: float
) -> dict[str, int]:
    """Return a record's counts for another cluster and length; their sum is rounded, not each."""
    times = days / record.days
    exact = [
        count
        * times
        * (1 if model.class_named(name).entity == "job" else cluster.gpus / record.gpus)
        for name, count in record.counts.items()
    ]
    reached = np.concatenate(([0], np.rint(np.cumsum(exact)))).astype(np.int64)
    return dict(zip(record.counts, np.diff(reached).tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Drawing:
    """One model on one cluster, with the streams of chance that it draws from."""

    model: FaultModel
    cluster: Cluster
    days: float
    struck: Strike
    shared: np.random.Generator
    streams: list[np.random.Generator]
    """One for each class."""

    @property
    def window_s(self) -> float:
        return self.days * DAY_S

    def means(self, scale: list[float], step_s: float) -> list[float]:
        """Return how many of each class are expected, besides those of the start."""
        return [
            each.hazard.per_s(step_s) * self.cluster.count(each.entity) * self.window_s * times
            for each, times in zip(self.model.classes, scale, strict=True)
        ]

    def require_room(self, means: list[float], scale: list[float]) -> None:
        """Refuse to draw more faults than memory is meant for."""
        begins = (
            each.chance_at_start(times) * self.cluster.count(each.entity)
            for each, times in zip(self.model.classes, scale, strict=True)
        )
        if (total := sum(means) + sum(begins)) > FAULTS_MAX:
            raise ModelError(
                f"model {self.model.name!r} comes to {total:.3g} faults in {self.days:g} days of "
                f"{self.cluster.gpus} GPUs, expected at most {FAULTS_MAX}",
                "lower rates, fewer days or fewer GPUs",
            )

    def moments(self, means: list[float], clock: Clock) -> list[Floats]:
        """Draw when each class happens."""
        classes = self.model.classes
        clocked = [clock != "poisson" and each.interrupting > 0 for each in classes]
        by_clock = [mean if on else 0.0 for mean, on in zip(means, clocked, strict=True)]
        dealt: list[Floats] = []
        if clock == "weibull":
            dealt = self._weibull(by_clock)
        if clock == "bursty":
            dealt = self._bursty(by_clock)
        return [
            dealt[kind] if on else arrivals.poisson(means[kind], self.window_s, self.streams[kind])
            for kind, on in enumerate(clocked)
        ]

    def _weibull(self, means: list[float]) -> list[Floats]:
        if self.model.weibull is None:
            raise _lacking(self.model, "weibull")
        shape = self.model.weibull.shape
        moments = arrivals.weibull(sum(means), self.window_s, shape, self.shared)
        return arrivals.shared_out(moments, means, self.shared)

    def _bursty(self, means: list[float]) -> list[Floats]:
        if self.model.bursts is None:
            raise _lacking(self.model, "bursts")
        weather = Weather(self.model.bursts, self.window_s, self.shared)
        return [weather.moments(m, s) for m, s in zip(means, self.streams, strict=True)]

    def at_start(self, kind: int, times: float) -> Places:
        """Draw the entities that have it from the start; each once."""
        fault, rng = self.model.classes[kind], self.streams[kind]
        probability = fault.chance_at_start(times)
        if not probability:
            return np.empty(0, dtype=np.int64)
        count = self.cluster.count(fault.entity)
        return np.sort(rng.choice(count, rng.binomial(count, probability), replace=False))

    def schedule(
        self, moments: list[Floats], begins: list[Places], recorded: frozenset[str] = frozenset()
    ) -> Schedule:
        """Draw everything else. What is recorded did interrupt the job, whatever the model says."""
        parts = []
        for kind, fault in enumerate(self.model.classes):
            rng = self.streams[kind]
            drawn = self.struck.places(fault, rng, len(moments[kind]))
            places = np.concatenate((begins[kind], drawn))
            at_s = np.concatenate((np.zeros(len(begins[kind])), moments[kind]))
            certain = fault.name in recorded and fault.effect not in ("sdc", "drain")
            parts.append(self._filled(kind, at_s, places, 1.0 if certain else fault.fatal))
        return Schedule(
            cluster=self.cluster,
            days=self.days,
            classes=self.model.classes,
            faults=joined(parts),
            lemons=self.struck.lemons,
        )

    def _filled(self, kind: int, at_s: Floats, places: Places, fatal_share: float) -> Columns:
        fault, rng, size = self.model.classes[kind], self.streams[kind], len(at_s)
        fatal = rng.random(size) < fatal_share
        node, nodes = self._hit(fault, places)
        lasts, out = fault.lasts, fault.out
        return Columns(
            at_s=at_s,
            kind=np.full(size, kind),
            place=places,
            node=node,
            nodes=self._with_neighbours(kind, node, nodes, fatal),
            fatal=fatal,
            slow=rng.uniform(*ratios(fault.slow), size),
            lasts_s=np.full(size, np.inf) if lasts is None else spread(lasts).draw(rng, size),
            out_s=np.zeros(size) if out is None else _out(self.model.repair_named(out), rng, size),
            notice_s=_notice(fault, rng, size),
            rollback=rng.random(size) < fault.rollback,
        )

    def _hit(self, fault: FaultClass, places: Places) -> tuple[Places, Places]:
        """Return the first node and the number of nodes that each fault breaks."""
        if fault.entity == "job":
            return np.full(len(places), -1), np.zeros(len(places), dtype=np.int64)
        return self.cluster.reach(fault.blast, self.cluster.node_of(fault.entity, places))

    def _with_neighbours(self, kind: int, node: Places, nodes: Places, fatal: Flags) -> Places:
        """Let some faults of one node take the next ones along."""
        fault, rng = self.model.classes[kind], self.streams[kind]
        together = self.model.coincidence
        if together is None or fault.blast != "node" or fault.cause != "hardware":
            return nodes
        joins = fatal & (rng.random(len(node)) < together.probability)
        more = np.where(joins, rng.integers(1, together.nodes_most + 1, len(node)), 0)
        return np.minimum(nodes + more, self.cluster.nodes - node)


def _drawing(
    model: FaultModel, cluster: Cluster, days: float, rng: np.random.Generator
) -> _Drawing:
    shared, lemons, *streams = rng.spawn(2 + len(model.classes))
    return _Drawing(
        model=model,
        cluster=cluster,
        days=days,
        struck=strike(model.lemons, cluster, lemons),
        shared=shared,
        streams=streams,
    )


def _out(repair: Repair, rng: np.random.Generator, size: int) -> Floats:
    """Draw how long nodes are out of service."""
    edges = np.cumsum([part.share for part in repair.parts])
    edges[-1] = 1.0  # the shares sum to one but for a rounding
    which = np.searchsorted(edges, rng.random(size), side="right")
    spans = np.stack([part.spread.draw(rng, size) for part in repair.parts])
    return np.asarray(spans[which, np.arange(size)], dtype=np.float64)


def _notice(fault: FaultClass, rng: np.random.Generator, size: int) -> Floats:
    """Draw how long before they happen faults are announced; 0 for those that are not."""
    if fault.notice is None:
        return np.zeros(size)
    announced = rng.random(size) < fault.notice.share
    return np.where(announced, fault.notice.ahead.draw(rng, size), 0.0)


def _require_classes(model: FaultModel, factors: Mapping[str, float]) -> None:
    known = [each.name for each in model.classes]
    for name, times in factors.items():
        if name not in known:
            raise missing(f"model {model.name!r}", "class", name, known)
        if not 0 <= times < np.inf:
            raise ModelError(
                f"factor of {name!r} is {times:g}, expected 0 or more", "0 switches it off"
            )


def _require_nodes(
    record: FaultRecord, counts: Mapping[str, int], model: FaultModel, cluster: Cluster, hint: str
) -> None:
    of_nodes = sum(n for name, n in counts.items() if model.class_named(name).entity != "job")
    if of_nodes > cluster.nodes:
        raise ModelError(
            f"record {record.name!r} has {of_nodes} faults of nodes, expected at most "
            f"{cluster.nodes}, as many as the cluster has nodes",
            hint,
        )


def _lacking(model: FaultModel, section: str) -> ModelError:
    return ModelError(
        f"model {model.name!r} has no `{section}`, which this clock needs",
        f"add `{section}:` to the model, or let faults come by another clock",
    )
