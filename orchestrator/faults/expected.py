"""What a fault model comes to on average, without drawing anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.faults.cluster import Cluster
from orchestrator.faults.draw import DAY_S, NONE, STEP_S
from orchestrator.faults.model import FaultClass, FaultModel
from orchestrator.faults.quantities import span_s


class Together(NamedTuple):
    """Faults that each take so many nodes out of service at once, for as long."""

    nodes: int
    per_day: float
    """Such faults."""
    out_s: float
    """Mean time that their nodes are out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Means of a model on one cluster, besides what is there from the start."""

    unexpected_per_day: float
    """Interruptions that are faults."""
    planned_per_day: float
    """Interruptions that are operations."""
    removals_per_day: float
    """Nodes that have to be taken out of service."""
    out_s: float
    """Mean time that one of them is out of service; 0 if there are none."""
    together: tuple[Together, ...]
    """How they leave: by how many at once, ascending."""
    detect_s: float
    """Mean time until an interruption is noticed, by checks like this project's."""

    @property
    def interruptions_per_day(self) -> float:
        """Of both kinds."""
        return self.unexpected_per_day + self.planned_per_day


def expected(
    model: FaultModel,
    cluster: Cluster,
    *,
    factor: float = 1.0,
    factors: Mapping[str, float] = NONE,
    step_s: float = STEP_S,
) -> Expected:
    """Return the means of a checked model.

    Args:
        model: what breaks.
        cluster: hardware rates scale with its entities; those of the job do not.
        factor: all rates are multiplied by it.
        factors: the rates of these classes as well.
        step_s: seconds of a step, for rates per step.
    """
    unexpected = planned = unnoticed = 0.0
    per_day, out_s = defaultdict[int, float](float), defaultdict[int, float](float)
    for fault in model.classes:
        times = factor * factors.get(fault.name, 1.0)
        per_s = fault.hazard.per_s(step_s) * cluster.count(fault.entity) * times
        share = 1.0 if fault.planned else fault.interrupting
        if fault.planned:
            planned += per_s * DAY_S
        else:
            unexpected += per_s * DAY_S * share
        if fault.detect is not None:
            unnoticed += per_s * DAY_S * share * span_s(fault.detect.good)
        if fault.out is not None:
            mean_s = model.repair_named(fault.out).mean_s
            for nodes, part in _nodes(model, cluster, fault).items():
                per_day[nodes] += per_s * DAY_S * part
                out_s[nodes] += per_s * DAY_S * part * mean_s
    together = tuple(
        Together(nodes, rate, out_s[nodes] / rate)
        for nodes, rate in sorted(per_day.items())
        if rate
    )
    removals = sum(each.nodes * each.per_day for each in together)
    out = sum(each.nodes * each.per_day * each.out_s for each in together)
    return Expected(
        unexpected_per_day=unexpected,
        planned_per_day=planned,
        removals_per_day=removals,
        out_s=out / removals if removals else 0.0,
        together=together,
        detect_s=unnoticed / (unexpected + planned) if unexpected + planned else 0.0,
    )


def _nodes(model: FaultModel, cluster: Cluster, fault: FaultClass) -> dict[int, float]:
    """Return how many nodes a fault of the class takes out, and with which probability.

    The last rack, power domain or pod may have fewer nodes, which is passed over, and so are
    neighbours that there are not at the end of a cluster.
    """
    together = model.coincidence
    if fault.blast == "node" and fault.cause == "hardware" and together is not None:
        joins = fault.fatal * together.probability
        each = joins / together.nodes_most
        found = defaultdict[int, float](float, {1: 1 - joins})
        for more in range(1, together.nodes_most + 1):
            found[min(1 + more, cluster.nodes)] += each
        return found
    return {min(cluster.nodes_per(fault.blast), cluster.nodes): 1.0}
