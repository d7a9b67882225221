"""What the sections of fault models and records have in common."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated

import msgspec

Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
Words = Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
ClassName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z", max_length=63)]


class ModelError(ValueError):
    """The parts of a model or record do not fit together, or do not fit the cluster.

    Attributes:
        hint: what to change.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[type[ModelError], tuple[str, str]]:
        """Have another process raise it here as it was."""
        return type(self), (str(self), self.hint)


class Section(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """A section of a file: unknown fields are refused."""


class Sourced(Section, frozen=True, kw_only=True):
    """A section whose numbers are published, or assumed; it says which."""

    source: Words | None = None
    """Where its numbers were published, or what they follow from."""
    assumption: Words | None = None
    """That nobody published them, and why they are what they are."""
    note: Words | None = None
    """Which of them are of another origin; how they disagree with other sources."""

    def __post_init__(self) -> None:
        if (self.source is None) == (self.assumption is None):
            found = "neither" if self.source is None else "both"
            raise ValueError(f"found {found} of `source` and `assumption`, expected exactly one")


def missing(where: str, what: str, name: str, known: Iterable[str]) -> ModelError:
    """Return the error for a name that is not there, with the nearest one that is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1, 0.4)
    return ModelError(
        f"{where}: there is no {what} {name!r}",
        f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names[:12]) or 'none'}",
    )
