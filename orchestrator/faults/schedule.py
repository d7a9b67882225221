"""Faults of a whole run as columns, sorted by time: what a simulated world lets happen.

A schedule is the ground truth of an experiment; what decides never sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

from orchestrator.faults.cluster import Cluster, Places
from orchestrator.faults.model import INTERRUPTS, FaultClass
from orchestrator.faults.quantities import Floats

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """One value per fault and column; all columns are equally long."""

    at_s: Floats
    """When it happens, seconds since the job started; 0.0 for what was there before."""
    kind: npt.NDArray[np.int64]
    """Index of its class in `Schedule.classes`."""
    place: Places
    """Which of the class's entities breaks, counted along the topology of the cluster."""
    node: Places
    """The first node that it breaks; -1 where none is to blame."""
    nodes: Places
    """How many nodes from there on; 0 where none is to blame."""
    fatal: Flags
    """The job can not go on with it. Of SDC: it shows by itself; otherwise it is silent."""
    slow: Floats
    """By which share of their speed steps are slower while it lasts, in [0, 1)."""
    lasts_s: Floats
    """Seconds after which it ends by itself; inf where something must be done about it."""
    out_s: Floats
    """How long its nodes are out of service once they are taken out; 0 where they are well."""
    notice_s: Floats
    """How long before `at_s` it is announced; 0 if it is not."""
    rollback: Flags
    """The newest checkpoint is of no use after it."""

    def taken(self, which: npt.NDArray[np.int64] | Flags) -> Self:
        """Return the faults of an index or a mask."""
        return type(self)(**{name: getattr(self, name)[which] for name in NAMES})


NAMES = tuple(field.name for field in fields(Columns))


def joined(parts: Sequence[Columns]) -> Columns:
    """Return all faults of the parts by time; of equal times in the order of the parts."""
    together = Columns(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in NAMES}
    )
    return together.taken(np.argsort(together.at_s, kind="stable"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """Faults of one run on one cluster."""

    cluster: Cluster
    days: float
    classes: tuple[FaultClass, ...]
    faults: Columns
    lemons: Places
    """Nodes that fail much more often than others, ascending."""

    def __len__(self) -> int:
        return len(self.faults.at_s)

    @property
    def planned(self) -> Flags:
        """Which are operations, not faults."""
        return self._of_class([each.planned for each in self.classes])

    @property
    def interrupting(self) -> Flags:
        """Which interrupt the job without being planned, at once or when they are found out."""
        always = self._of_class([each.effect in INTERRUPTS for each in self.classes])
        return (self.faults.fatal | always) & ~self.planned

    @property
    def counts(self) -> dict[str, int]:
        """How many of each class, in the order of the classes."""
        numbers = np.bincount(self.faults.kind, minlength=len(self.classes))
        return {each.name: int(n) for each, n in zip(self.classes, numbers, strict=True)}

    def _of_class(self, values: list[bool]) -> Flags:
        return np.array(values, dtype=np.bool_)[self.faults.kind]
