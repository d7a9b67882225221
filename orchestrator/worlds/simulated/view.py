"""What agents would see of their ranks, as columns over the world.

Letters in array names: R ranks of the world, N nodes of the world in rank order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from orchestrator.core.events import Telemetry
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Step
from orchestrator.protocol.messages import StepReport
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

    heard: set[NodeId]
    reports: tuple[StepReport, ...]
    since_step_s: float
    stall_s: float
    watched_s: float


class _Columns(NamedTuple):
    phases: tuple[int, ...]
    steps: tuple[int, ...]
    progress: tuple[int, ...]
    states: str
    cpu_s: tuple[float, ...]


_NOBODY = _Columns((-1,), (-1,), (-1,), "?", (0.0,))


def telemetry(team: Team | None, at: Seconds, news: News) -> Telemetry:
    """Return one tick of a team, as far as its nodes are heard."""
    columns = _NOBODY
    if team is not None:
        alike = team.whole and team.in_step and news.heard.issuperset(team.ranks)
        columns = (_alike if alike else _each)(team, at, news.heard)
    return Telemetry(
        at=at,
        generation=team.generation if team is not None else Generation(0),
        heard=tuple(sorted(news.heard)),
        phases=columns.phases,
        steps=columns.steps,
        progress=columns.progress,
        states=columns.states,
        cpu_s=columns.cpu_s,
        stall_s=news.stall_s,
        reports=news.reports,
        since_step_s=news.since_step_s,
        watched_s=news.watched_s,
    )


def _alike(team: Team, at: Seconds, heard: set[NodeId]) -> _Columns:
    """Return columns of length one: every rank does the same, and is heard."""
    del heard
    step, moves, busy_s = _progress(team, at)
    phase = _phase(team, team.lowest, step)
    return _Columns((phase,), (step,), (team.lowest + 10 + moves,), "S", (busy_s,))


def _each(team: Team, at: Seconds, heard: set[NodeId]) -> _Columns:
    """Return one number per rank."""
    step, moves, busy_s = _progress(team, at)
    counts_N = np.array([len(team.ranks[node.id]) for node in team.members])
    place_R = np.empty(len(team.seats), np.int64)
    place_R[np.concatenate([team.ranks[node.id] for node in team.members])] = np.repeat(
        np.arange(len(counts_N)), counts_N
    )
    marks_N = np.array([team.mark_of(node.id) for node in team.members])
    phases_N = np.array([_phase(team, int(mark), step) for mark in marks_N])
    silent_N = np.array([node.id not in heard for node in team.members])
    phase_R, silent_R = phases_N[place_R], silent_N[place_R]
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
        phases=tuple(np.where(silent_R, -1, phase_R).tolist()),
        steps=tuple(np.where(silent_R, -1, step).tolist()),
        progress=tuple(np.where(silent_R, -1, marks_N[place_R] + 10 + moves).tolist()),
        states=np.where(silent_R, np.uint8(ord("?")), letter_R).tobytes().decode("ascii"),
        cpu_s=tuple(np.where(silent_R, 0.0, cpu_s_R).tolist()),
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
