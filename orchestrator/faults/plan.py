"""A fault plan: what is broken, where and when, as data with a seed.

The plan is the ground truth of an experiment. The controller's detectors and policies never see
it; they see what the broken thing does.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

import msgspec
import numpy as np

from orchestrator.faults.catalogue import CATALOGUE, EXTRAS, Extra, FaultKind
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.runfile import Duration, NonNegative, seconds

Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Probability = Annotated[float, msgspec.Meta(gt=0, le=1)]
Times = Annotated[float, msgspec.Meta(gt=1, le=100)]
SLOW_SHARE = 0.5
FLIPPED_BIT = 20
SLOW_DELAY = "200ms"
SLOW_TIMES = 2.0
SLOW_LINK_TIMES = 10.0


class PlanError(ValueError):
    """The plan can not be carried out on this run.

    Attributes:
        hint: what to change.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class _Section(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """A section of a plan: unknown fields are refused."""


class When(_Section, frozen=True, kw_only=True):
    """The moment: when the target completes `step`, or `after` since the run's first step.

    With `probability`, the plan's seed decides whether it happens at all.
    """

    step: NonNegative | None = None
    after: Duration | None = None
    probability: Probability = 1.0


class Fault(_Section, frozen=True, kw_only=True):
    """One fault."""

    when: When
    fault: FaultKind
    rank: NonNegative | None = None
    node: str | None = None
    for_: Duration | None = msgspec.field(default=None, name="for")
    """How long it lasts; without it, until something is done about it."""
    hold_gil: bool | None = None
    """Of spin-rank: whether no other thread of the rank gets to run either; default false."""
    share: Share | None = None
    """Of slow-rank: which part of its time the rank gets; default 0.5."""
    delay: Duration | None = None
    """Of slow-disk: how much longer each operation takes; default 200ms. Of stall-data: how much
    longer the samples of a micro-batch take to read; without it they never come."""
    times: Times | None = None
    """Of throttle-rank and overload-rank: default 2. Of slow-link: default 10."""
    state: Literal["weights", "exp_avg", "exp_avg_sq", "gradient"] | None = None
    """Of flip-bit: in what; default weights. `gradient` is the sum over all ranks."""
    tensor: str | None = None
    """Of flip-bit: in which weight's, by name; default the first. Of wrong-matmul: with which
    weight; default every one that a layer multiplies with."""
    element: NonNegative | None = None
    """Of flip-bit: in which element of the rank's part of it, counted around; default 0. Of
    wrong-matmul: of the product."""
    bit: Annotated[int, msgspec.Meta(ge=0, le=63)] | None = None
    """Of flip-bit: which bit, 0 the least significant; default 20."""
    at_step: NonNegative | None = None
    """Within which optimizer step, at or after `when`: an order takes time to arrive. Default the
    next one; one that is over by then is made up for."""

    chance: Probability | None = None
    """Of wrong-matmul: with which each product of a weight comes out wrong; default 1."""
    magnitude: float | None = None
    """Of wrong-matmul: what is added to one element of it; default 1."""

    @property
    def lasts_s(self) -> float | None:
        """Seconds until it ends by itself; None if it does not."""
        return None if self.for_ is None else seconds(self.for_)

    @property
    def runs_share(self) -> float:
        """Part of its time that a slow rank gets, in (0, 1)."""
        return SLOW_SHARE if self.share is None else self.share

    @property
    def delay_s(self) -> float:
        """Seconds that each operation of a slow disk takes longer."""
        return seconds(SLOW_DELAY if self.delay is None else self.delay)

    def extras(self) -> tuple[Extra, ...]:
        """Return which of the fields are there that not every fault takes."""
        values = (
            self.for_,
            self.hold_gil,
            self.share,
            self.delay,
            self.state,
            self.tensor,
            self.element,
            self.bit,
            self.at_step,
            self.chance,
            self.magnitude,
            self.times,
        )
        return tuple(name for name, value in zip(EXTRAS, values, strict=True) if value is not None)

    @property
    def flip(self) -> dict[str, str | int | float]:
        """What a rank is told of a bit that it is to flip."""
        return {
            "state": self.state or "weights",
            "tensor": self.tensor or "",
            "element": self.element or 0,
            "bit": FLIPPED_BIT if self.bit is None else self.bit,
            "atStep": self.at_step or 0,
        }

    @property
    def wrong(self) -> dict[str, str | int | float]:
        """What a rank is told of products that are to come out wrong."""
        return {
            "tensor": self.tensor or "",
            "element": self.element or 0,
            "atStep": self.at_step or 0,
            "chance": 1.0 if self.chance is None else self.chance,
            "magnitude": 1.0 if self.magnitude is None else self.magnitude,
        }

    @property
    def slowdown(self) -> dict[str, str | int | float]:
        """What a rank is told that is to compute more slowly, or more."""
        return {"times": SLOW_TIMES if self.times is None else self.times}

    @property
    def drag(self) -> float:
        """Times as long as copies take on a slow link."""
        return SLOW_LINK_TIMES if self.times is None else self.times

    @property
    def stall(self) -> dict[str, str | int | float]:
        """What a rank is told whose samples come late, or never."""
        return {"never": 1} if self.delay is None else {"delay": seconds(self.delay)}

    def describe(self) -> str:
        """Return it in words: `freeze-rank rank 2 at step 40`."""
        target = f" rank {self.rank}" if self.rank is not None else ""
        target += f" {self.node}" if self.node is not None else ""
        moment = f"step {self.when.step}" if self.when.step is not None else f"{self.when.after}"
        return f"{self.fault}{target} at {moment}"


class ArmedFault(msgspec.Struct, frozen=True, kw_only=True):
    """A fault with its index in the plan, as an agent is told to watch for it."""

    index: int
    fault: Fault


class FaultPlan(_Section, frozen=True, kw_only=True):
    """A plan file."""

    kind: Literal["FaultPlan"]
    api_version: Literal["holdfast.dev/v1alpha1"] = "holdfast.dev/v1alpha1"
    seed: NonNegative = 0
    faults: tuple[Fault, ...] = ()

    def drawn(self) -> tuple[ArmedFault, ...]:
        """Return the faults that happen: those with a probability are drawn by the seed."""
        chance = np.random.Generator(np.random.Philox(self.seed))
        draws = chance.random(len(self.faults))
        return tuple(
            ArmedFault(index=index, fault=fault)
            for index, (fault, draw) in enumerate(zip(self.faults, draws, strict=True))
            if draw < fault.when.probability
        )


def check(plan: FaultPlan, *, world_size: int, nodes: tuple[NodeId, ...], steps: int) -> None:
    """Refuse a plan that names what the run does not have.

    Raises:
        PlanError: naming the fault, what was found and what is there.
    """
    for index, fault in enumerate(plan.faults):
        where = f"faults[{index}] ({fault.fault})"
        _check_moment(fault, where, steps)
        traits = CATALOGUE[fault.fault]
        _check_target(fault, where)
        if traits.target == "rank" and fault.rank is None:
            raise PlanError(f"{where}: no rank is named", f"add `rank:` 0 to {world_size - 1}")
        if fault.rank is not None and fault.rank >= world_size:
            raise PlanError(
                f"{where}: rank is {fault.rank}, expected 0 to {world_size - 1}",
                "ranks count from 0 to nodes.count x nodes.ranksPerNode - 1",
            )
        if traits.target == "node" and fault.node is None and fault.rank is None:
            raise PlanError(f"{where}: no node is named", f"add `node:`, one of {', '.join(nodes)}")
        if fault.node is not None and fault.node not in nodes:
            near = difflib.get_close_matches(fault.node, nodes, 1, 0.0)
            raise PlanError(
                f"{where}: node is {fault.node!r}, expected one of {', '.join(nodes)}",
                f"did you mean {near[0]!r}?" if near else "the run has no nodes",
            )
        _check_extras(fault, where)


def _check_target(fault: Fault, where: str) -> None:
    """Refuse a target that would be ignored, or would keep the fault from ever being due."""
    if CATALOGUE[fault.fault].target == "controller" and (fault.rank, fault.node) != (None, None):
        raise PlanError(
            f"{where}: it is not aimed at a rank or a node", "remove `rank:` and `node:`"
        )
    if fault.rank is not None and fault.node is not None:
        raise PlanError(
            f"{where}: both rank {fault.rank} and {fault.node} are named",
            "name one: a rank is hit on whichever node it is by then",
        )


def _check_extras(fault: Fault, where: str) -> None:
    """Refuse a field that would do nothing: whoever wrote it meant something else."""
    takes = CATALOGUE[fault.fault].takes
    for name in fault.extras():
        if name not in takes:
            more = f"it takes {' and '.join(f'`{t}:`' for t in takes)}; " if takes else ""
            raise PlanError(f"{where}: `{name}` does not apply", f"{more}remove `{name}:`")


def _check_moment(fault: Fault, where: str, steps: int) -> None:
    when = fault.when
    if (when.step is None) == (when.after is None):
        raise PlanError(f"{where}: `when` needs exactly one of step, after", "when: {step: 12}")
    if when.step is not None and when.step > steps:
        raise PlanError(
            f"{where}: step is {when.step}, the run ends at {steps}", "choose an earlier step"
        )
    for name, text in (("when.after", when.after), ("for", fault.for_), ("delay", fault.delay)):
        if text is not None:
            try:
                seconds(text)
            except ValueError as error:
                raise PlanError(f"{where}: {name}: {error}", "write for example `5s`") from error
