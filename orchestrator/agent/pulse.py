"""What an agent reads off its ranks' beacons: the steps they completed, and the periodic beat."""

from __future__ import annotations

import math
from typing import NamedTuple

from orchestrator.agent import linux
from orchestrator.agent.account import SEATED, Account
from orchestrator.agent.live import LiveRank
from orchestrator.agent.ranks import Ranks
from orchestrator.protocol.ids import Generation, Rank
from orchestrator.protocol.messages import Beat, GroupCounts, StepReport
from orchestrator.worker.beacon import StepRecord

DIGITS = 4
"""Of how long a rank computed, that are told: from 7 % on a rank is slow (detect.straggler)."""


def collect(account: Account, ranks: Ranks) -> None:
    """Take in what the lowest rank here has completed, and what each has digested.

    Every rank of a world sees every step.
    """
    for place, (rank, live) in enumerate(ranks.seated().items()):
        if place == 0:
            collect_from(account, live)
        for record in live.beacon.new_digests():
            if record.generation == account.generation:
                account.record_digests(rank, record.taken, record.values)


def collect_from(account: Account, live: LiveRank) -> None:
    """Take in the steps that one rank has completed in the present generation."""
    account.record(
        _report(record)
        for record in live.beacon.new_steps()
        if record.generation == account.generation
    )


def beat(account: Account, ranks: Ranks, groups: tuple[GroupCounts, ...] = ()) -> Beat:
    """Return how the ranks of the present generation are; counts its step reports as sent."""
    rows = []
    seated = ranks.seated()
    for rank in account.ranks:
        live = seated.get(rank)
        if live is not None and live.seat and live.seat.generation == account.generation:
            rows.append(_row(rank, live, account.generation))
        elif account.mark >= SEATED:
            rows.append(_Row(rank))
    columns = tuple(zip(*rows, strict=True)) or ((),) * len(_Row._fields)
    return Beat(
        generation=account.generation,
        ranks=columns[0],
        phases=columns[1],
        steps=columns[2],
        progress=columns[3],
        states="".join(columns[4]),
        cpu_s=columns[5],
        stall_s=columns[6],
        compute_s=columns[7],
        busy_s=columns[8],
        work=columns[9],
        entered=columns[10],
        left=columns[11],
        reports=account.unsent(),
        digests=account.unsent_digests(),
        groups=groups,
    )


def newest_move_ns(ranks: Ranks) -> int:
    """Return when any rank last showed a sign of life, CLOCK_MONOTONIC nanoseconds; 0 if none."""
    readings = (live.read() for live in ranks.seated().values())
    return max((reading.moved_ns for reading in readings if reading is not None), default=0)


class _Row(NamedTuple):
    """What a beat says of one rank; by default, of one that has no process."""

    rank: Rank
    phase: int = 0
    step: int = -1
    progress: int = -1
    state: str = "X"
    cpu_s: float = 0.0
    stall_s: float = 0.0
    compute_s: float = 0.0
    busy_s: float = 0.0
    work: float = 0.0
    entered: int = -1
    left: int = -1


def _row(rank: Rank, live: LiveRank, generation: Generation) -> _Row:
    vitals = linux.vitals(live.pid)
    state, cpu_s = vitals if vitals is not None else ("X", 0.0)
    reading = live.read()
    if reading is None:
        return _Row(rank, state=state, cpu_s=cpu_s)
    # Until it has taken this seat, its beacon tells of the one before.
    taken = reading.generation == generation
    if taken:
        live.keep_pace(reading)
    compute_s, busy_s, work = live.pace if taken else (0.0, 0.0, 0.0)
    return _Row(
        rank,
        phase=int(reading.phase),
        step=reading.step if taken else -1,
        progress=reading.progress,
        state=state,
        cpu_s=cpu_s,
        stall_s=_finite(reading.stall_s),
        compute_s=_short(compute_s),
        busy_s=_short(busy_s),
        work=_short(work),
        entered=reading.collectives if taken else -1,
        left=reading.left if taken else -1,
    )


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


def _short(value: float) -> float:
    """Return a number that is compared with its peers', with as many digits as count.

    All of them are on record: of 16,384 ranks, packed, a tick took 197 KB and takes 38.
    """
    return float(f"{_finite(value):.{DIGITS}g}")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
