"""What a fault model comes to on average, without drawing anything."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.faults.cluster import Cluster
from orchestrator.faults.draw import DAY_S, STEP_S
from orchestrator.faults.model import FaultClass, FaultModel
from orchestrator.faults.quantities import span_s


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
    detect_s: float
    """Mean time until an interruption is noticed, by checks like this project's."""

    @property
    def interruptions_per_day(self) -> float:
        """Of both kinds."""
        return self.unexpected_per_day + self.planned_per_day


def expected(
    model: FaultModel, cluster: Cluster, *, factor: float = 1.0, step_s: float = STEP_S
) -> Expected:
    """Return the means of a checked model, all rates multiplied by `factor`."""
    unexpected = planned = removals = out = unnoticed = 0.0
    for fault in model.classes:
        per_s = fault.hazard.per_s(step_s) * cluster.count(fault.entity) * factor
        share = 1.0 if fault.planned else fault.interrupting
        if fault.planned:
            planned += per_s * DAY_S
        else:
            unexpected += per_s * DAY_S * share
        if fault.detect is not None:
            unnoticed += per_s * DAY_S * share * span_s(fault.detect.good)
        if fault.out is not None:
            removed = per_s * DAY_S * _nodes(model, cluster, fault)
            removals += removed
            out += removed * model.repair_named(fault.out).mean_s
    return Expected(
        unexpected_per_day=unexpected,
        planned_per_day=planned,
        removals_per_day=removals,
        out_s=out / removals if removals else 0.0,
        detect_s=unnoticed / (unexpected + planned) if unexpected + planned else 0.0,
    )


def _nodes(model: FaultModel, cluster: Cluster, fault: FaultClass) -> float:
    """Return how many nodes a fault of the class takes out on average."""
    together = model.coincidence
    if fault.blast == "node" and fault.cause == "hardware" and together is not None:
        return 1 + fault.fatal * together.probability * (1 + together.nodes_most) / 2
    return min(cluster.nodes_per(fault.blast), cluster.nodes)
