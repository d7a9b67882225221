"""What a campaign lets loose that is a matter of time: ranks that stand still, ranks that are slow.

Each trial is a whole run, since limits and persistence are what is tried. Classes come in turn, so
that two seeds differ in ranks, steps and sizes, and not in how many of each class there are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from orchestrator.campaign.catalogue import Blame, Trial
from orchestrator.protocol.ids import Rank

Kind = Literal["hang", "straggler"]
STEPS = 50
"""Of a run."""
FIRST, LAST = 12, 20
"""Steps after which a fault strikes: what is normal is known by then."""
WITHIN_STEPS = 20
"""In which a rank that is a tenth slower is to be found."""


class TimedClass(NamedTuple):
    """A class of faults."""

    name: str
    group: Kind
    fault: str
    """Its kind in a fault plan."""
    blame: Blame = ""
    times: tuple[float, float] | None = None
    """Between which limits it is drawn how many times as long everything takes."""
    delay_ms: tuple[int, int] | None = None
    """Between which it is drawn how much later samples come."""
    hold_gil: bool | None = None


CLASSES: tuple[TimedClass, ...] = (
    TimedClass("hang, process stopped", "hang", "freeze-rank"),
    TimedClass("hang, endless loop", "hang", "spin-rank", hold_gil=False),
    TimedClass("hang, samples never come", "hang", "stall-data"),
    TimedClass("hang, system call never returns", "hang", "block-rank"),
    TimedClass("hang, endless loop in C", "hang", "spin-rank", hold_gil=True),
    TimedClass("hang, a collective left out", "hang", "skip-collective"),
    TimedClass("hang, another collective entered", "hang", "mismatch-collective"),
    TimedClass("slow device, 10 to 25 %", "straggler", "throttle-rank", "hardware", (1.1, 1.25)),
    TimedClass("more work, 25 to 100 %", "straggler", "overload-rank", "workload", (1.25, 2.0)),
    TimedClass("slow device, 25 to 100 %", "straggler", "throttle-rank", "hardware", (1.25, 2.0)),
    TimedClass(
        "slow source of samples", "straggler", "stall-data", "workload", delay_ms=(200, 300)
    ),
)


def draw(kind: Kind, seed: int, trials: int, *, ranks: int, first: int = 0) -> list[Trial]:
    """Return the trials of one kind: the same for the same arguments.

    Args:
        kind: which.
        seed: of everything that chance decides.
        trials: how many.
        ranks: of the world.
        first: number of the first one.
    """
    classes = [each for each in CLASSES if each.group == kind]
    return [
        _trial(classes[place % len(classes)], seed, first + place, ranks) for place in range(trials)
    ]


def _trial(of: TimedClass, seed: int, number: int, ranks: int) -> Trial:
    chance = np.random.Generator(np.random.Philox(key=[seed, number]))
    shape: dict[str, float | str | bool] = {}
    if of.times is not None:
        shape["times"] = round(float(chance.uniform(*of.times)), 3)
    if of.delay_ms is not None:
        shape["delay"] = f"{int(chance.integers(*of.delay_ms, endpoint=True))}ms"
    if of.hold_gil is not None:
        shape["holdGil"] = of.hold_gil
    return Trial(
        number=number,
        name=of.name,
        group=of.group,
        live=of.fault,
        rank=Rank(int(chance.integers(ranks))),
        step=int(chance.integers(FIRST, LAST, endpoint=True)),
        shape=shape,
        blame=of.blame,
    )
