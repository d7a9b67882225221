"""What a campaign lets loose, as data, and how a seed draws trials from it.

Each row is a class of faults with a number of trials in every hundred; trials are stratified, so
that two seeds differ in where a fault strikes and not in how many of each class there are. Rows
are what the reference has in its section on honest evaluation: single bits by position class are
less than half, since most corruption of real devices has more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import msgspec
import numpy as np

from orchestrator.protocol.ids import Rank
from orchestrator.protocol.injections import Form, Injection, Pace, Site, Span

Group = Literal[
    "state",
    "persistent",
    "intermittent",
    "rare",
    "oneshot",
    "sum",
    "data",
    "detector",
    "live",
    "hang",
    "straggler",
]
"""What is summed up together. `state`: what ranks hold alike, and checkpoints; `persistent`,
`intermittent` (p of 0.1 and more), `rare` and `oneshot`: what a rank computes, by how often it is
wrong; `sum`: gradients behind a rank's products, so that the sum is wrong for all alike; `data`:
tokens; `detector`: digests that are wrong themselves; `live`: whole runs with the controller;
`hang` and `straggler`: whole runs as well, of what is a matter of time (campaign.timed)."""
GROUPS: tuple[Group, ...] = get_args(Group)
Blame = Literal["", "hardware", "workload"]
"""Whether it is the device that is slow, or what it has to do; "" if neither was said."""

SIGN, EXPONENT, TOP, LOW = "sign", "exponent", "top-mantissa", "low-mantissa"
POSITIONS: dict[str, range] = {
    SIGN: range(31, 32),
    EXPONENT: range(23, 31),
    TOP: range(18, 23),
    LOW: range(18),
}
"""Bits of a float32 by class, 0 the least significant."""
MULTI_BITS = 4
"""Flipped together where several are. Source: TrainSDC."""
HORIZON: dict[Group, int] = {
    "state": 3,
    "persistent": 8,
    "intermittent": 120,
    "rare": 120,
    "oneshot": 8,
    "sum": 8,
    "data": 8,
    "detector": 3,
}
"""Steps within which a fault has to be noticed, or counts as missed."""
LIVE_OF = 40
"""One of so many trials is a whole run, which takes a hundred times as long."""
MOMENTS = 4
"""Steps after a snapshot at which a fault may begin."""
TRIALS_OF_ONE = 50
"""Of one trajectory, after which the next one has other weights and another order of samples. To
bring a world to its snapshots takes as long as some 30 trials of state: with so many in between, it
is a third of the time of a campaign of state alone, and little of one of everything."""
_TRAJECTORIES = 1 << 32
"""Added to the number of a trajectory, so that it is drawn like no trial."""


class Stratum(NamedTuple):
    """A class of faults."""

    name: str
    group: Group
    weight: int
    """Share of all trials, in parts of the sum."""
    sites: tuple[Site, ...]
    form: Form
    positions: tuple[str, ...] = ()
    elements: tuple[int, ...] = (1,)
    multi: bool = False
    """Whether several bits of an element flip, of whatever class."""
    pace: Pace = "once"
    chances: tuple[float, ...] = (1.0,)
    within: Span | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One fault to be let loose on the run as it is at a snapshot."""

    number: int
    name: str
    """Of its class."""
    group: Group
    trainer_seed: int | None = None
    """Of the trajectory that it strikes; None of a whole run."""
    snapshot: int = 0
    injection: Injection | None = None
    live: str = ""
    """Of `live`, `hang` and `straggler`: which kind of fault a whole run meets."""
    rank: Rank = Rank(0)
    """Of `hang` and `straggler`: whose."""
    step: int = 0
    """And after which step."""
    shape: dict[str, float | str | bool] = {}
    """And the fields of a fault plan that it has besides."""
    blame: Blame = ""
    """Of `straggler`: what makes the rank slow."""

    @property
    def horizon(self) -> int:
        """Within how many steps it has to be noticed."""
        return HORIZON[self.group]


STATE: tuple[Site, ...] = ("weights", "exp_avg", "exp_avg_sq", "gradient")
PRODUCTS: tuple[Site, ...] = ("matmul", "input-gradient", "local-gradient")
COMPUTED: tuple[Site, ...] = (*PRODUCTS, "activation")
_MANY = (10, 1_000, 100_000)
_MIDDLE = Span(low=0.01, high=0.1)

CATALOGUE: tuple[Stratum, ...] = (
    Stratum("state, sign bit", "state", 12, STATE, "flip", (SIGN,)),
    Stratum("state, exponent bit", "state", 12, STATE, "flip", (EXPONENT,)),
    Stratum("state, top mantissa bit", "state", 12, STATE, "flip", (TOP,)),
    Stratum("state, low mantissa bit", "state", 12, STATE, "flip", (LOW,)),
    Stratum("state, 4 bits of many", "state", 10, STATE, "flip", (), _MANY, multi=True),
    Stratum("state, tile", "state", 8, STATE, "tile", (), (16, 64), multi=True),
    Stratum("state, stuck", "state", 6, STATE, "stuck", (), pace="always"),
    Stratum("state, swapped words", "state", 5, ("weights", "exp_avg"), "swap"),
    Stratum("state, stale block", "state", 5, STATE, "stale", (), (256,)),
    Stratum("state, zeroed block", "state", 5, STATE, "zeros", (), (256,)),
    Stratum("optimizer, wrong update", "state", 5, ("update",), "bias", (), (1, 64)),
    Stratum("optimizer, wrong step counter", "state", 3, ("step-counter",), "bias"),
    Stratum("checkpoint, bits after its digest", "state", 6, ("staged",), "flip", (LOW, TOP)),
    Stratum("checkpoint, bits before its digest", "state", 4, ("copied",), "flip", (LOW, TOP)),
    Stratum(
        "compute, every product",
        "persistent",
        16,
        PRODUCTS,
        "flip",
        (EXPONENT, TOP),
        pace="always",
    ),
    Stratum("compute, low bits", "persistent", 12, PRODUCTS, "flip", (LOW,), pace="always"),
    Stratum("compute, tile", "persistent", 10, PRODUCTS, "tile", (), (16,), True, "always"),
    Stratum("compute, stuck unit", "persistent", 8, PRODUCTS, "stuck", pace="always"),
    Stratum(
        "compute, only in a range",
        "persistent",
        10,
        ("matmul", "input-gradient"),
        "bias",
        (),
        (100_000,),
        pace="always",
        within=_MIDDLE,
    ),
    Stratum(
        "compute, activation in memory",
        "persistent",
        6,
        ("activation",),
        "flip",
        (TOP, LOW),
        pace="always",
    ),
    Stratum(
        "compute, p = 0.3",
        "intermittent",
        10,
        COMPUTED,
        "flip",
        (EXPONENT, TOP, LOW),
        pace="chance",
        chances=(0.3,),
    ),
    Stratum(
        "compute, p = 0.1",
        "intermittent",
        15,
        COMPUTED,
        "flip",
        (EXPONENT, TOP, LOW),
        pace="chance",
        chances=(0.1,),
    ),
    Stratum(
        "compute, p = 0.01",
        "rare",
        8,
        COMPUTED,
        "flip",
        (EXPONENT, TOP, LOW),
        pace="chance",
        chances=(0.01,),
    ),
    Stratum("once, one bit", "oneshot", 16, COMPUTED, "flip", (SIGN, EXPONENT, TOP, LOW)),
    Stratum("once, 4 bits of many", "oneshot", 8, COMPUTED, "flip", (), _MANY, multi=True),
    Stratum("once, infinity", "oneshot", 4, ("matmul", "local-gradient"), "inf"),
    Stratum("once, huge", "oneshot", 4, COMPUTED, "huge"),
    Stratum("sum delivered wrong to all", "sum", 6, ("delivered",), "flip", (EXPONENT, TOP)),
    Stratum(
        "sum delivered wrong to all, always",
        "sum",
        4,
        ("delivered",),
        "flip",
        (EXPONENT, TOP),
        pace="always",
    ),
    Stratum("gradient in memory, before the sum", "sum", 6, ("bucket",), "flip", (EXPONENT, TOP)),
    Stratum("tokens of one rank", "data", 6, ("tokens",), "swap", pace="once"),
    Stratum("digest of one rank", "detector", 6, ("digest",), "flip", (LOW,)),
)
SELECTABLE: tuple[Group, ...] = tuple(dict.fromkeys(stratum.group for stratum in CATALOGUE))
"""The groups that there are rows of."""


def draw(
    seed: int,
    trials: int,
    *,
    ranks: int,
    snapshots: int,
    live: tuple[str, ...] = (),
    groups: tuple[Group, ...] = SELECTABLE,
) -> list[Trial]:
    """Return the trials of a campaign: the same for the same arguments.

    A trial of the small world is the same for the same seed, number and groups, however many there
    are of them.

    Args:
        seed: of everything that chance decides.
        trials: how many.
        ranks: of the world.
        snapshots: states that faults may strike.
        live: what whole runs meet in turn; they count among the trials.
        groups: of which the trials are, in the proportions that they have among all.
    """
    whole = max(trials // LIVE_OF, 1) if live else 0
    kinds = [live[number % len(live)] for number in range(whole)]
    strata = list(_stratified(trials - len(kinds), groups))
    found = [
        _trial(number, stratum, seed, ranks, snapshots) for number, stratum in enumerate(strata)
    ]
    return found + [
        Trial(number=len(strata) + place, name=f"whole run, {kind}", group="live", live=kind)
        for place, kind in enumerate(kinds)
    ]


def trajectory(seed: int, number: int) -> int:
    """Return the `trainer.seed` of the run that the trial of this number strikes."""
    place = _TRAJECTORIES + number // TRIALS_OF_ONE
    return int(np.random.Generator(np.random.Philox(key=[seed, place])).integers(1 << 31))


def _stratified(trials: int, groups: tuple[Group, ...]) -> Iterator[Stratum]:
    """Yield so many classes of some groups, each as often as its weight says, spread evenly."""
    rows = [stratum for stratum in CATALOGUE if stratum.group in groups]
    total = sum(stratum.weight for stratum in rows)
    due = [0.0] * len(rows)
    for _ in range(trials):
        due = [was + each.weight / total for was, each in zip(due, rows, strict=True)]
        chosen = max(range(len(due)), key=due.__getitem__)
        due[chosen] -= 1.0
        yield rows[chosen]


def _trial(number: int, stratum: Stratum, seed: int, ranks: int, snapshots: int) -> Trial:
    chance = np.random.Generator(np.random.Philox(key=[seed, number]))
    snapshot = int(chance.integers(snapshots))
    bits: tuple[int, ...] = ()
    if stratum.multi:
        bits = tuple(sorted(int(b) for b in chance.choice(32, MULTI_BITS, replace=False)))
    elif stratum.positions:
        position = POSITIONS[stratum.positions[int(chance.integers(len(stratum.positions)))]]
        bits = (int(chance.choice(position)),)
    injection = Injection(
        site=stratum.sites[int(chance.integers(len(stratum.sites)))],
        form=stratum.form,
        rank=Rank(int(chance.integers(ranks))),
        step=1 + int(chance.integers(MOMENTS)),
        pace=stratum.pace,
        chance=stratum.chances[int(chance.integers(len(stratum.chances)))],
        micro=int(chance.integers(1 << 16)),
        place=float(chance.random()),
        element=float(chance.random()),
        bits=bits,
        elements=stratum.elements[int(chance.integers(len(stratum.elements)))],
        within=stratum.within,
        seed=int(chance.integers(1 << 31)),
    )
    return Trial(
        number=number,
        name=stratum.name,
        group=stratum.group,
        trainer_seed=trajectory(seed, number),
        snapshot=snapshot,
        injection=injection,
    )
