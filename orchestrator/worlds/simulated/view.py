"""What agents would see of their ranks, as columns over the world.

Letters in array names: R ranks of the world.
"""

from __future__ import annotations

import numpy as np

from orchestrator.core.events import Telemetry
from orchestrator.protocol.ids import NodeId, Seconds
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


def telemetry(
    team: Team, at: Seconds, *, heard: set[NodeId], reports: tuple[StepReport, ...], stall_s: float
) -> Telemetry:
    """Return one tick of a team, as far as its nodes are heard."""
    size = len(team.seats)
    phase_R = np.array(
        [_PHASE_AT.get(team.mark_of(seat), RankPhase.BACKWARD) for seat in team.seats], np.int64
    )
    progress, busy_s, step = 0, 0.0, team.start
    if team.pace is not None:
        step = team.pace.done(at)
        progress = int(team.pace.progress(at) * MOVES_PER_STEP)
        busy_s = team.pace.progress(at)
        if step >= team.pace.last and not team.finished:
            phase_R[:] = RankPhase.FINISHING
    marks = np.array([team.mark_of(seat) for seat in team.seats], np.int64)
    progress_R = marks + 10 + progress
    cpu_s_R = np.full(size, busy_s)
    states = ["S"] * size
    for rank in sorted(team.still):
        # It never came to where the others wait for it.
        if team.pace is not None and step < team.pace.last:
            phase_R[rank] = RankPhase.FORWARD
        states[rank] = team.still[rank]
        if team.still[rank] == "R" and team.stopped_at is not None:
            cpu_s_R[rank] += at - team.stopped_at
    silent_R = np.array([seat not in heard for seat in team.seats])
    silent_R[sorted(team.dead)] = True
    return Telemetry(
        at=at,
        generation=team.generation,
        heard=tuple(sorted(heard)),
        phases=tuple(np.where(silent_R, -1, phase_R).tolist()),
        steps=tuple(np.where(silent_R, -1, step).tolist()),
        progress=tuple(np.where(silent_R, -1, progress_R).tolist()),
        states="".join("?" if s else letter for s, letter in zip(silent_R, states, strict=True)),
        cpu_s=tuple(np.where(silent_R, 0.0, cpu_s_R).tolist()),
        stall_s=stall_s,
        reports=reports,
    )
