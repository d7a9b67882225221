"""Small experiments: a few nodes, an hour, and exactly the faults that a test is about."""

from __future__ import annotations

from typing import Any

import msgspec

from orchestrator import compose
from orchestrator.faults.model import FaultModel
from orchestrator.faults.record import FaultRecord, Row
from orchestrator.simulation.experiment import Inputs
from orchestrator.simulation.settings import Settings
from orchestrator.worlds.simulated.profile import Constant, Profile

MINUTE_DAYS = 1 / 1440


def constant(seconds: float) -> Constant:
    return Constant(seconds, "assumed", "a test wants it so")


BRISK = Profile(
    name="brisk", order=constant(0.1), exit=constant(0.1), trouble=constant(1.0),
    stop=constant(1.0), seat=constant(0.5), warm=constant(2.0), rendezvous=constant(2.0),
    load=constant(1.0), fetch=constant(1.0), read=constant(10.0), first_step=constant(1.0),
    step=constant(2.0), stall=constant(0.05), copy=constant(0.5), write=constant(5.0),
    commit=constant(0.5), search=constant(0.5), reboot=constant(60.0), gone=constant(0.5),
)  # fmt: skip


def given(
    counts: dict[str, int] | None = None,
    *,
    minutes: float = 30,
    model: FaultModel | None = None,
    profile: Profile = BRISK,
    **settings: Any,
) -> Inputs:
    """An experiment in which so many faults of each class happen, and nothing else."""
    model = compose.packaged_model() if model is None else model
    plain = msgspec.structs.replace(model, diurnal=None, lemons=None, diagnosis=None)
    asked = Settings(
        **{"gpus": 64, "days": minutes * MINUTE_DAYS, "spares": 2, "background": False, **settings}
    )
    record = None
    if counts is not None:
        rows = tuple(
            Row(component=name, category="of a test", count=count, class_=name)
            for name, count in counts.items()
        )
        record = FaultRecord(
            kind="FaultRecord", name="exact", model=plain.name, days=asked.days, gpus=asked.gpus,
            rows=rows, assumption="of a test",
        )  # fmt: skip
    return Inputs(
        settings=asked.checked(plain, record), model=plain, record=record, profile=profile
    )
