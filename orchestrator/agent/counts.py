"""In which collectives the ranks of this node stand, told once one of them has not moved for long.

Told of ranks that move, it would be most of what is said, and nobody needs it: only of those that
stand still is it asked who waits for whom.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.agent.account import Account
from orchestrator.protocol.ids import Rank
from orchestrator.protocol.messages import GroupCounts
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worker.beacon import BeaconError, BeaconReader, GroupCount


def stood_s(account: Account, limits: Timeouts) -> float:
    """Return for how long a rank has to stand still for that to be told, seconds.

    Well before it counts as a hang, and longer than it does between signs of life in its steps.
    """
    return limits.hang_s / 2 + account.step_s()


def untold(
    account: Account, beacons: Mapping[Rank, BeaconReader], now_ns: int, after_s: float
) -> tuple[GroupCounts, ...]:
    """Return counts of all ranks here if one stands still, and that was not told; now it is.

    Args:
        account: remembers what was told.
        beacons: of the ranks here. One that is none (any more) is left out.
        now_ns: CLOCK_MONOTONIC, nanoseconds.
        after_s: for how long a rank must not have moved.
    """
    read: dict[Rank, list[GroupCount]] = {}
    news = False
    for rank, beacon in beacons.items():
        try:
            reading = beacon.read()
            if reading.generation != account.generation:
                continue
            read[rank] = beacon.groups(account.generation)
        except (BeaconError, ValueError):
            continue
        stands = now_ns - reading.moved_ns > after_s * 1e9
        if stands and account.stood.get(rank) != reading.progress:
            account.stood[rank] = reading.progress
            news = True
    if not news:
        return ()
    rows: dict[str, list[tuple[Rank, int, int, str]]] = {}
    for rank, groups in read.items():
        for group, entered, left, what in groups:
            rows.setdefault(group, []).append((rank, entered, left, what))
    return tuple(_row(group, each) for group, each in rows.items())


def _row(group: str, told: list[tuple[Rank, int, int, str]]) -> GroupCounts:
    ranks, entered, left, titles = zip(*told, strict=True)
    return GroupCounts(group, ranks, entered, left, titles if any(titles) else ())
