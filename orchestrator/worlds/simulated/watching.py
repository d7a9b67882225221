"""What detectors of silent corruption notice of each kind of it, and how soon: a profile's part.

A detector looks every so many steps. What it notices at all (`recall`), it notices after a number
of looks; the first of them comes half a period after the onset, on average. So it takes
(looks - 1/2) periods of steps, and then until it is told, proven and acted upon.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec

from orchestrator.faults.corruption import CorruptionKind
from orchestrator.faults.quantities import span_s
from orchestrator.faults.sections import Probability, Section, Words

Origin = Literal["measured", "published", "assumed"]
Detectors = Literal["none", "digests", "both"]
HOLDERS_MIN = 2
"""Of the same shard, or there is nobody whose digests could be compared."""
VOTERS_MIN = 3
"""Of so many, a majority says who is wrong (detect.votes); of fewer, all are suspected."""


class _Found(Section, frozen=True, kw_only=True, omit_defaults=True):
    """Where a number comes from."""

    origin: Origin
    source: Words
    samples: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Of how many it was counted, if it was measured."""

    def __post_init__(self) -> None:
        if (self.origin == "measured") != (self.samples > 0):
            raise ValueError(
                f"origin is {self.origin} and samples is {self.samples}, expected samples with "
                "what was measured, and with nothing else"
            )


class Recall(_Found, frozen=True, kw_only=True, omit_defaults=True):
    """Which share is noticed at all."""

    value: Probability


class Looks(_Found, frozen=True, kw_only=True, omit_defaults=True):
    """After how many looks; half a look is the very moment of the onset."""

    value: Annotated[float, msgspec.Meta(ge=0.5, le=1e6)]


class Every(_Found, frozen=True, kw_only=True, omit_defaults=True):
    """Steps between two looks."""

    value: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Told(_Found, frozen=True, kw_only=True, omit_defaults=True):
    """From the end of the step that showed it until the order that takes its node away."""

    value: str
    """A span, such as 300ms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        span_s(self.value)

    @property
    def seconds(self) -> float:
        """The same, in seconds."""
        return span_s(self.value)


class Watching(Section, frozen=True, kw_only=True):
    """Which detectors watch."""

    value: Detectors
    """none; digests: those of state that replicas hold alike; both: and the ring replay."""
    origin: Origin
    source: Words


class Sight(Section, frozen=True, kw_only=True):
    """What is noticed of one kind of corruption."""

    by: Literal["digests", "replay"]
    recall: Recall
    looks: Looks


class Watch(Section, frozen=True, kw_only=True):
    """The detectors of silent corruption that a system has."""

    watching: Watching
    digest_every: Every
    """Steps in which all of the state is digested once."""
    replay_every: Every
    """Steps between two micro-batches that others compute once more."""
    tell: Told
    notices: dict[CorruptionKind, Sight]

    def see(self, kind: CorruptionKind | None, *, holders: int, step_s: float) -> Seen | None:
        """Return how one kind is noticed; None if nothing looks at it.

        Args:
            kind: of corruption; None if a model does not say.
            holders: ranks that hold the same shard.
            step_s: what a step takes, seconds.
        """
        sight = self.notices.get(kind) if kind is not None else None
        if sight is None or self.watching.value == "none":
            return None
        digests = sight.by == "digests"
        if (not digests and self.watching.value != "both") or (digests and holders < HOLDERS_MIN):
            return None
        every = (self.digest_every if digests else self.replay_every).value
        return Seen(
            recall=sight.recall.value,
            after_s=(sight.looks.value - 0.5) * every * step_s + self.tell.seconds,
            every=every,
            proven=not digests or holders >= VOTERS_MIN,
        )


class Seen(NamedTuple):
    """How one kind of corruption is noticed in a job."""

    recall: float
    after_s: float
    """From the onset until the controller is told who it was, on average."""
    every: int
    """Steps between two looks: what is older than the last of them is known to be good."""
    proven: bool
    """Whether it is known whose fault it is, or only that it is one of those who hold the same."""
