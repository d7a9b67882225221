"""What the conductor of a campaign and the ranks of its small world say to each other.

One JSON object a line, over a socket for each rank. Digests do not go this way: they take the one
that they take in a run, through the beacon.
"""

from __future__ import annotations

from typing import Any

import msgspec

from orchestrator.protocol.ids import Generation
from orchestrator.protocol.injections import Injection
from orchestrator.protocol.rank import Diverged


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a world is made of; in a file that its program reads."""

    job: dict[str, Any]
    """As a seat has it (`TrainingRun.job`)."""
    world_size: int
    cache_dir: str
    """Where tokens are kept."""
    meeting: str
    """File at which ranks meet; it must not exist yet."""
    beacons: tuple[str, ...]
    """The file of each rank."""


class _Order(msgspec.Struct, frozen=True, kw_only=True, tag_field="order"):
    """To a rank; all ranks get the same orders in the same order."""


class Train(_Order, frozen=True, kw_only=True, tag="train"):
    """Take so many steps, and remember under this number what state they lead to."""

    steps: int
    snapshot: int


class Return(_Order, frozen=True, kw_only=True, tag="return"):
    """Be in a state that was remembered; from now on something may go wrong."""

    snapshot: int
    generation: Generation
    """That digests belong to from now on."""
    injection: Injection | None = None
    """Its steps count from the snapshot's."""


class Resume(_Order, frozen=True, kw_only=True, tag="resume"):
    """Be in the state of a checkpoint; nothing is wrong from now on."""

    store: str
    """Address of the store."""
    commit: str
    """Key of its commit record."""
    generation: Generation
    """That digests belong to from now on."""


class Step(_Order, frozen=True, kw_only=True, tag="step"):
    """Take so many steps, or fewer, if one never comes out the same twice."""

    steps: int


class Quiet(_Order, frozen=True, kw_only=True, tag="quiet"):
    """Take so many steps without anything wrong, one way or the other, and say only how long."""

    steps: int
    detectors: bool = True
    reload_every: int = 0
    """How often state goes through bytes of a checkpoint and back; 0: never."""
    look_every: int = 0
    """How often a loss is evaluated without learning from it; 0: never."""
    garbage_every: int = 0
    """How often all ranks are given tokens that no text has; 0: never."""


class Drift(_Order, frozen=True, kw_only=True, tag="drift"):
    """Take so many steps while nobody looks for what is wrong, and say what that comes to.

    It comes right after `Return`.
    """

    steps: int
    places: int | None = None
    """Of a clean run: which sample of a global batch is in whose place, 0 for each in its own,
    which comes first. None with a fault."""


Order = Train | Return | Resume | Step | Quiet | Drift


class Gap(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How far what steps come to is from what others came to, at the most."""

    loss: float | None
    """Of samples that were not learned from; None if it is not finite."""
    weights: float | None
    """Their distance, as a share of their norm; None if some are not finite."""


class StepRow(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a step came to on one rank, as whoever judges trials sees it and no detector does."""

    step: int
    loss: float | None
    """None if it is not finite: JSON has no such numbers."""
    grad_norm: float | None
    weights: str
    """Fingerprint of them after the step."""
    state: str
    """Of weights, what the optimizer remembers, the gradient that it was given, and tokens."""
    struck: int
    """How often the injection has changed something so far."""


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's answer to an order."""

    rows: tuple[StepRow, ...] = ()
    seconds: tuple[float, ...] = ()
    """Of each step, of `Quiet`."""
    struck: int = 0
    """How often the injection has changed something so far, in steps that were thrown away too."""
    diverged: tuple[Diverged, ...] = ()
    """What ranks found together; in a run, the agent hears it."""
    looked_again: tuple[int, ...] = ()
    """Steps that stood out, and came out the same when they were computed once more."""
    gap: Gap | None = None
    """Of `Drift`: a clean run's to all clean ones before it, and otherwise to the first of them."""
    refused: str = ""
    """What was raised over bytes of a checkpoint that are not what was staged."""
    broken: str = ""
    """What was raised otherwise; the rank is gone after that."""
