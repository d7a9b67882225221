"""What agents would see of their ranks, as columns over the world.

Letters in array names: R ranks of the world.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.core.events import Telemetry
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Step
from orchestrator.protocol.messages import MARKS, StepReport
from orchestrator.protocol.phases import RankPhase
from orchestrator.worlds.simulated.team import FINISHED, FORMED, RESTORED, SEATED, Team

MOVES_PER_STEP = 100
"""Signs of life of a rank in one step; enough for one in every look at a step of minutes."""
_PHASE_AT = {
    0: RankPhase.STARTING,
    1: RankPhase.STARTING,
    SEATED: RankPhase.RENDEZVOUS,
    FORMED: RankPhase.RESTORING,
    RESTORED: RankPhase.WARMING,
    FINISHED: RankPhase.DONE,
}


class News(NamedTuple):
    """What there is to tell besides what ranks do."""

    heard: tuple[NodeId, ...]
    """Sorted."""
    reports: tuple[StepReport, ...]
    since_step_s: float
    stall_s: float
    watched_s: float
    compute_s: tuple[float, ...]
    """Seconds of a step that each rank computes; one number for all of them, if it is the same."""
    replayed: Step
    """As `Telemetry` has it."""


class _Columns(NamedTuple):
    phases: tuple[int, ...]
    steps: tuple[int, ...]
    progress: tuple[int, ...]
    states: str
    cpu_s: tuple[float, ...]


_NOBODY = _Columns((-1,), (-1,), (-1,), "?", (0.0,))


class Told:
    """The columns that were told last: what is the same again is told in the same words."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[npt.NDArray[Any], tuple[Any, ...]]] = {}

    def words(self, name: str, column_R: npt.NDArray[Any]) -> tuple[Any, ...]:
        """Return a column as the event has it."""
        known = self._columns.get(name)
        if known is None or not np.array_equal(known[0], column_R):
            known = self._columns[name] = (column_R, tuple(column_R.tolist()))
        return known[1]


def telemetry(team: Team | None, at: Seconds, news: News, told: Told) -> Telemetry:
    """Return one tick of a team, as far as its nodes are heard."""
    columns = _NOBODY
    if team is not None:
        silent = team.silent(news.heard)
        alike = team.whole and team.in_step and not silent
        columns = _alike(team, at) if alike else _each(team, at, silent, told)
    return Telemetry(
        at=at,
        generation=team.generation if team is not None else Generation(0),
        heard=news.heard,
        phases=columns.phases,
        steps=columns.steps,
        progress=columns.progress,
        states=columns.states,
        cpu_s=columns.cpu_s,
        stall_s=news.stall_s,
        compute_s=news.compute_s,
        reports=news.reports,
        since_step_s=news.since_step_s,
        watched_s=news.watched_s,
        replayed=news.replayed,
    )


def _alike(team: Team, at: Seconds) -> _Columns:
    """Return columns of length one: every rank does the same, and is heard."""
    step, moves, busy_s = _progress(team, at)
    phase = _phase(team, team.lowest, step)
    return _Columns((phase,), (step,), (team.lowest + 10 + moves,), "S", (busy_s,))


def _each(team: Team, at: Seconds, silent: frozenset[NodeId], told: Told) -> _Columns:
    """Return one number per rank."""
    step, moves, busy_s = _progress(team, at)
    mark_R = np.fromiter(team.marks, np.int64)[team.place_R]
    phase_R = np.array([_phase(team, mark, step) for mark in range(len(MARKS))])[mark_R]
    silent_R = np.zeros(len(team.seats), np.bool_)
    for node in silent:
        silent_R[list(team.ranks[node])] = True
    cpu_s_R = np.full(len(team.seats), busy_s)
    letter_R = np.full(len(team.seats), ord("S"), np.uint8)
    for rank in sorted(team.still):
        # It never came to where the others wait for it.
        if team.pace is not None and step < team.pace.last:
            phase_R[rank] = RankPhase.FORWARD
        letter_R[rank] = ord(team.still[rank])
        if team.still[rank] == "R" and team.stopped_at is not None:
            cpu_s_R[rank] += at - team.stopped_at
    silent_R[sorted(team.dead)] = True
    return _Columns(
        phases=told.words("phases", np.where(silent_R, -1, phase_R)),
        steps=told.words("steps", np.where(silent_R, -1, step)),
        progress=told.words("progress", np.where(silent_R, -1, mark_R + 10 + moves)),
        states=np.where(silent_R, np.uint8(ord("?")), letter_R).tobytes().decode("ascii"),
        cpu_s=told.words("cpu_s", np.where(silent_R, 0.0, cpu_s_R)),
    )


def _progress(team: Team, at: Seconds) -> tuple[Step, int, float]:
    """Return steps done, signs of life and processor seconds of a rank."""
    if team.pace is None:
        return team.start, 0, 0.0
    progress = team.pace.progress(at)
    return team.pace.done(at), int(progress * MOVES_PER_STEP), progress


def _phase(team: Team, mark: int, step: Step) -> int:
    if team.pace is not None and step >= team.pace.last and not team.finished:
        return int(RankPhase.FINISHING)
    return int(_PHASE_AT.get(mark, RankPhase.BACKWARD))
