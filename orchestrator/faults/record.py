"""What did interrupt a run, counted, each row as an instance of a class of a fault model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import msgspec

from orchestrator.faults.model import FaultModel
from orchestrator.faults.sections import ClassName, ModelError, Section, Sourced, Words, missing
from orchestrator.protocol.runfile import Positive

Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]


class Row(Section, frozen=True, kw_only=True):
    """One row of a record, in the words of its source, and what it is in the model."""

    component: Words
    category: Words
    count: Count
    class_: ClassName | dict[ClassName, Count] = msgspec.field(name="class")
    """The class; or several, with how many of the row each of them was."""

    @property
    def counts(self) -> dict[str, int]:
        """How many of each class."""
        return {self.class_: self.count} if isinstance(self.class_, str) else dict(self.class_)

    def __post_init__(self) -> None:
        total = sum(self.counts.values())
        if total != self.count:
            raise ValueError(f"classes of {self.component!r} sum to {total}, count is {self.count}")


class FaultRecord(Sourced, frozen=True, kw_only=True):
    """A record file: what interrupted a run, counted."""

    kind: Literal["FaultRecord"]
    api_version: Literal["holdfast.dev/v1alpha1"] = "holdfast.dev/v1alpha1"
    name: ClassName
    model: ClassName
    """The model whose classes the rows name."""
    days: Annotated[float, msgspec.Meta(gt=0, le=36_525)]
    gpus: Positive
    rows: Annotated[tuple[Row, ...], msgspec.Meta(min_length=1, max_length=256)]
    notes: tuple[Words, ...] = ()

    def checked(self, model: FaultModel) -> Self:
        """Return the record itself, if it is of this model and that has all of its classes.

        Raises:
            ModelError: naming the first that it has not.
        """
        if self.model != model.name:
            raise ModelError(
                f"record {self.name!r} is of model {self.model!r}, expected {model.name!r}",
                "hand in the model that its rows name classes of",
            )
        known = {each.name for each in model.classes}
        for index, row in enumerate(self.rows):
            for name in row.counts:
                if name not in known:
                    raise missing(f"rows[{index}] ({row.component!r})", "class", name, known)
        return self

    @property
    def counts(self) -> dict[str, int]:
        """How many of each class, in the order of the rows."""
        counts: dict[str, int] = {}
        for row in self.rows:
            for name, count in row.counts.items():
                counts[name] = counts.get(name, 0) + count
        return counts
