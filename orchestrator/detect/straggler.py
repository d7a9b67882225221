"""Finds ranks that compute more slowly than their peers again and again, as opposed to once.

Compared is the time that a rank computes, without what it waits, for as much work, with ranks that
do the same: of the same stage of the pipeline and the same part of each tensor. A throttled
processor shows in the processor time that computing takes, which other programs hardly change; a
process that does not get its core by the wall clock alone. Either makes a suspect, and no more: a
long sequence looks like a slow device until the device is measured (core.slowness), and only then
it is known who is to blame, if anybody.

Letters in array names: W windows, R ranks of the world, P peers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.core import slowness
from orchestrator.core.events import Event, Telemetry
from orchestrator.core.incident import STRAGGLER, Cause, Clock, Finding
from orchestrator.core.paces import WINDOWS, Paces, middle
from orchestrator.core.phases import RunPhase
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Generation, Rank, Seconds

Z_MIN: dict[Clock, float] = {"wall": 5.0, "processor": 4.0}
"""Standard deviations (robust: median, MAD) from the peers' median. By the wall clock ranks of a
busy machine differ by a tenth and more, and 4 would find one of 900 worlds of those. Processor time
differs by less, and with 5 three ranks in which it does by 5 % would find half as many so soon."""
RATIO_MIN = 1.07
"""Times the peers' median. A rank that is 10 % slow takes 1.11 on average: with 1.1 as the limit
noise of 2 % would hide it in three windows of ten, and what a suspicion costs is a probe."""
WALL_ALONE_MIN = 1.5
"""The same by the wall clock, where processor time is known and does not show it: that is a rank
which does not get its core. It has to be slow in every window that is kept, too. Other programs
take cores now from one rank and now from another, for seconds at a time: on two cores with a load
of 10, ranks without a fault came to 1.36."""
RATIO_CLEAR = 1.03
"""Below that a rank is as fast as its peers again: far from `RATIO_MIN`, or noise would tell."""
COOL_LOOKS = 20
"""For which a rank is not found again, twice as many each time."""
WORSE = 2.0
"""Times as slow as when more work explained it, from which on a rank is measured once more in the
same generation."""
SLOW_SHARE = 0.8
"""Of the windows that are looked at: all of three, eight of ten (core.paces)."""
PEERS_MIN = 3
"""Of two that differ nobody can say which one is right."""
SPREAD_MIN = 0.01
"""By which share sound peers differ at least, whatever was seen of them."""
SPREAD_PEERS = 8
"""Of so many peers or more, their spread can be told from one of them that is slow, and one of them
hardly moves the median of all."""
_MAD_TO_SIGMA = 1.4826
_MEDIAN_TO_MEAN = 1.2533
"""Of a normal distribution: sigma over MAD, and how much less sure a median is than a mean."""


class Suspicion(NamedTuple):
    """How slow a rank is, and by which clock."""

    ratio: float
    """Times the median of its peers that it takes, the median over windows."""
    clock: Clock


class _Mark(NamedTuple):
    """What is known of a rank that was found in this generation."""

    clock: Clock
    """By which it was found last."""
    slow: bool
    """Whether it has been slow ever since."""
    times: int
    """How often it was found."""
    again_at: int
    """The look from which on it may be found again."""


class Straggler:
    """A suspect is found once; again, if it was as fast as its peers in between, ever less often.

    Or a rank at the limit would be found, and measured, while all others wait, at every look.
    """

    name = "straggler"

    def __init__(self) -> None:
        self._looks = -1
        self._generation = Generation(0)
        self._marks: dict[Rank, _Mark] = {}
        self._suspects: dict[Rank, Suspicion] = {}
        """Who was slow at the newest look, ascending."""

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return a finding for each rank that has become slow."""
        paces = state.paces
        if not isinstance(event, Telemetry) or state.wanting:
            return []
        if state.phase is not RunPhase.TRAINING or not paces.full or paces.looks == self._looks:
            return []
        known = state.generation == self._generation and paces.as_at(self._looks)
        if state.generation != self._generation:
            self._generation, self._marks = state.generation, {}
        self._looks = paces.looks
        if not known:
            self._compare(state)
        slow = self._suspects
        new = [rank for rank, found in slow.items() if self._is_news(state, rank, found)]
        for rank in new:
            times = self._marks[rank].times if rank in self._marks else 0
            again_at = paces.looks + (COOL_LOOKS << times)
            self._marks[rank] = _Mark(slow[rank].clock, True, times + 1, again_at)
        if not new:
            return []
        slowest_s, other_s = what_if_s(paces.compute_s_WR()[-paces.newest :], tuple(slow))
        return [_finding(state, rank, slow[rank], slowest_s - other_s) for rank in new]

    def _compare(self, state: RunState) -> None:
        """Take in who is slow as of now, and who is no more."""
        numbers_R = slowness.alike(state.run.layout, len(state.seats))
        ratio_R, self._suspects = suspects(state.paces, numbers_R)
        for rank, mark in self._marks.items():
            if ratio_R[rank] < RATIO_CLEAR:
                self._marks[rank] = mark._replace(slow=False)

    def _is_news(self, state: RunState, rank: Rank, found: Suspicion) -> bool:
        mark = self._marks.get(rank)
        explained = slowness.explained(state, rank, found.clock)
        if mark is None:
            return True
        if mark.clock == "wall" and found.clock == "processor":
            # What a wall clock shows may have been anything; this is the device, or more work.
            return found.ratio > explained
        return (
            not mark.slow
            and self._looks >= mark.again_at
            and found.ratio - 1 > WORSE * (explained - 1)
        )


def suspects(
    paces: Paces, peers_R: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], dict[Rank, Suspicion]]:
    """Return how slow each rank is by the clock that says most, and which are so persistently.

    Who is so by both clocks is suspected by processor time: how slow it is by that, the same work
    on the device will show or not, whatever else the machine does. Who is so by the wall clock
    alone has to be much slower to be suspected.

    Args:
        paces: of a generation, with enough windows.
        peers_R: ranks with the same number are compared with each other, shape [R].
    """
    most_R, found = np.ones(len(peers_R)), dict[Rank, Suspicion]()
    work_WR = paces.work_WR()
    for clock in paces.clocks:  # processor time comes last
        ratio_R, slow = stragglers(
            rates(paces.compute_s_WR(clock), work_WR), peers_R, paces.newest, clock
        )
        most_R = np.maximum(most_R, ratio_R)
        found |= {Rank(int(rank)): Suspicion(float(ratio_R[rank]), clock) for rank in slow}
        if clock == "processor":
            found |= {
                rank: Suspicion(float(ratio_R[rank]), clock)
                for rank, wall in found.items()
                if ratio_R[rank] > RATIO_MIN
                and ratio_R[rank] - 1 > slowness.EXPLAINED * (wall.ratio - 1)
            }
            found = {
                rank: each
                for rank, each in found.items()
                if each.clock == "processor"
                or (each.ratio > WALL_ALONE_MIN and _always(paces, peers_R, rank))
            }
    return most_R, dict(sorted(found.items()))


def _always(paces: Paces, peers_R: npt.NDArray[np.int64], rank: Rank) -> bool:
    """Return whether a rank is slow by the wall clock in all windows that are kept, if all are."""
    peers = np.flatnonzero(peers_R == peers_R[rank])
    rate_WP = rates(paces.compute_s_WR(), paces.work_WR())[:, peers]
    ratio_W = (rate_WP / _usual_WP(rate_WP))[:, int(np.searchsorted(peers, rank))]
    return len(ratio_W) == WINDOWS and bool((ratio_W > RATIO_MIN).all())


def rates(
    compute_s_WR: npt.NDArray[np.float64], work_WR: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return seconds for a unit of work, shape [W, R]; NaN where nothing was measured."""
    return np.where(compute_s_WR > 0, compute_s_WR / work_WR, np.nan)


def stragglers(
    rate_WR: npt.NDArray[np.float64],
    peers_R: npt.NDArray[np.int64],
    newest: int = WINDOWS,
    clock: Clock = "wall",
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return how slow each rank is, and which ranks are slow persistently.

    Args:
        rate_WR: seconds for a unit of work, shape [W, R]; NaN for not measured.
        peers_R: ranks with the same number are compared with each other, shape [R].
        newest: how many windows, up to the newest, tell who is slow now.
        clock: by which they were measured.

    Returns:
        Times the median of its peers that each rank takes, the median over the newest windows,
        shape [R]; and the slow ones, ascending. A rank without enough peers is never slow.

    Source: own rule. Noise is that of all peers over all windows together: the MAD of three numbers
    in one window says nothing. Cost: O(W R log R), a few milliseconds for 16,384 ranks.

    >>> rate = np.tile([1.0, 1.0, 1.3, 1.0], (10, 1))
    >>> stragglers(rate, np.zeros(4, np.int64))[1]
    array([2])
    """
    ratio_R, slow_R = np.ones(rate_WR.shape[1]), np.zeros(rate_WR.shape[1], np.bool_)
    for number in np.unique(peers_R):
        of_group = np.flatnonzero(peers_R == number)
        # Who has not said in every window how long it took is compared with nobody.
        known = of_group[np.isfinite(rate_WR[:, of_group]).all(axis=0)]
        if len(known) >= PEERS_MIN:
            ratio_R[known], slow_R[known] = _compare(rate_WR[:, known], newest, Z_MIN[clock])
    return ratio_R, np.flatnonzero(slow_R)


def _compare(
    rate_WP: npt.NDArray[np.float64], newest: int, z_min: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return how slow each of some peers is, and whether that is neither noise nor chance."""
    ratio_WP = rate_WP / _usual_WP(rate_WP)
    noise = _MAD_TO_SIGMA * float(np.median(np.abs(ratio_WP - middle(ratio_WP))))
    ratio_WP = ratio_WP[-newest:]
    ratio_P = middle(ratio_WP)
    spread = 0.0
    if len(ratio_P) >= SPREAD_PEERS:
        spread = _MAD_TO_SIGMA * float(np.median(np.abs(ratio_P - np.median(ratio_P))))
    error = _MEDIAN_TO_MEAN * noise / math.sqrt(len(ratio_WP))
    z_P = (ratio_P - 1) / math.hypot(error, max(spread, SPREAD_MIN))
    often_P = (ratio_WP > RATIO_MIN).sum(axis=0) >= often(len(ratio_WP))
    return ratio_P, (z_P > z_min) & (ratio_P > RATIO_MIN) & often_P


def _usual_WP(rate_WP: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return what each is compared with in a window: the median of all, of few that of the others.

    Of three, one always is the median, which takes noise for less than it is, and who is slow for
    less slow: the median is then the slower of the two others.
    """
    if rate_WP.shape[1] >= SPREAD_PEERS:
        whole_W1: npt.NDArray[np.float64] = np.median(rate_WP, axis=1, keepdims=True)
        return whole_W1
    others = [np.delete(rate_WP, peer, axis=1) for peer in range(rate_WP.shape[1])]
    return np.stack([np.median(of_WP, axis=1) for of_WP in others], axis=1)


def often(windows: int) -> int:
    """Return in how many of some windows a rank is slow that is so persistently.

    >>> [often(windows) for windows in (3, 4, 5, 10)]
    [3, 4, 4, 8]
    """
    return math.ceil(SLOW_SHARE * windows)


def what_if_s(
    compute_s_WR: npt.NDArray[np.float64], suspects: Sequence[Rank]
) -> tuple[float, float]:
    """Return how long the slowest rank computes in a step, and the slowest that is no suspect."""
    median_R = middle(compute_s_WR)
    others = np.delete(median_R, list(suspects))
    slowest_s = float(median_R.max())
    return slowest_s, float(others.max()) if len(others) else slowest_s


_WORDS: dict[Clock, str] = {"wall": "by the wall clock", "processor": "in processor time"}


def _finding(state: RunState, rank: Rank, found: Suspicion, gain_s: float) -> Finding:
    paces, ratio = state.paces, found.ratio
    step_s = state.step_times.quantile(0.5)
    better_s = max(step_s - gain_s, 0.0)
    slow_s, slow_steps = often(paces.newest) * state.timeouts.tick_s, often(paces.steps)
    node = state.seats[rank]
    return Finding(
        at=state.now,
        since=Seconds(max(state.now - max(slow_steps * step_s, slow_s), 0.0)),
        kind=STRAGGLER,
        cause=Cause.UNKNOWN,
        ranks=(rank,),
        nodes=(node,),
        step=state.reached_step,
        evidence=f"rank {rank} on {node} computes {ratio:.2f} times as long as its peers for the "
        f"same work {_WORDS[found.clock]}, in {often(paces.newest)} of {paces.newest} windows or "
        f"more ({paces.steps} steps); a step takes {step_s:.3g} s, and would take {better_s:.3g} s "
        "without that",
        clock=found.clock,
        measure=(ratio, max(step_s - better_s, 0.0) / step_s if step_s else 0.0),
    )
