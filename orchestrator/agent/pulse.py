"""What an agent reads off its ranks' beacons: the steps they completed, and the periodic beat."""

from __future__ import annotations

import math

from orchestrator.agent import linux
from orchestrator.agent.account import SEATED, Account
from orchestrator.agent.live import LiveRank
from orchestrator.agent.ranks import Ranks
from orchestrator.protocol.ids import Generation, Rank
from orchestrator.protocol.messages import Beat, StepReport
from orchestrator.worker.beacon import StepRecord


def collect(account: Account, ranks: Ranks) -> None:
    """Take in what the lowest rank here has completed. Every rank of a world sees every step."""
    for live in ranks.seated().values():
        collect_from(account, live)
        break


def collect_from(account: Account, live: LiveRank) -> None:
    """Take in the steps that one rank has completed in the present generation."""
    account.record(
        _report(record)
        for record in live.beacon.new_steps()
        if record.generation == account.generation
    )


def beat(account: Account, ranks: Ranks) -> Beat:
    """Return how the ranks of the present generation are; counts its step reports as sent."""
    rows = []
    seated = ranks.seated()
    for rank in account.ranks:
        live = seated.get(rank)
        if live is not None and live.seat and live.seat.generation == account.generation:
            rows.append(_row(rank, live, account.generation))
        elif account.mark >= SEATED:
            rows.append((rank, 0, -1, -1, "X", 0.0, 0.0))
    columns = tuple(zip(*rows, strict=True)) or ((),) * 7
    return Beat(
        generation=account.generation,
        ranks=columns[0],
        phases=columns[1],
        steps=columns[2],
        progress=columns[3],
        states="".join(columns[4]),
        cpu_s=columns[5],
        stall_s=columns[6],
        reports=account.unsent(),
    )


def newest_move_ns(ranks: Ranks) -> int:
    """Return when any rank last showed a sign of life, CLOCK_MONOTONIC nanoseconds; 0 if none."""
    readings = (live.read() for live in ranks.seated().values())
    return max((reading.moved_ns for reading in readings if reading is not None), default=0)


def _row(
    rank: Rank, live: LiveRank, generation: Generation
) -> tuple[Rank, int, int, int, str, float, float]:
    vitals = linux.vitals(live.pid)
    state, cpu_s = vitals if vitals is not None else ("X", 0.0)
    reading = live.read()
    if reading is None:
        return rank, 0, -1, -1, state, cpu_s, 0.0
    # Until it has taken this seat, its beacon tells of the one before.
    step = reading.step if reading.generation == generation else -1
    return rank, int(reading.phase), step, reading.progress, state, cpu_s, _finite(reading.stall_s)


def _report(record: StepRecord) -> StepReport:
    return StepReport(
        step=record.step,
        loss=_or_none(record.loss),
        grad_norm=_or_none(record.grad_norm),
        tokens=record.tokens,
        seconds=_finite(record.seconds),
    )


def _or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
