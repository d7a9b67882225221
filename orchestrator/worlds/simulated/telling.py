"""What the controller is told of a simulated team, look by look."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.events import Telemetry, Tick
from orchestrator.protocol.ids import Step
from orchestrator.protocol.messages import StepReport
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.simulated.cluster import Cluster
from orchestrator.worlds.simulated.looks import Looks
from orchestrator.worlds.simulated.profile import Profile
from orchestrator.worlds.simulated.team import Team
from orchestrator.worlds.simulated.view import News, Told, telemetry


class Telling:
    """Of one cluster.

    Args:
        cluster: the machines.
        looks: when it is looked at.
        run: what is run.
        profile: how long things take.
        replay_every: steps between two in which ranks compute each other's last micro-batches once
            more; 0 if they never do.

    Attributes:
        reported: the newest step that was told of.
        cadence: how often the team saves.
        step_s: seconds of one of its steps.
        compute_s: as `News` has it.
    """

    def __init__(
        self, cluster: Cluster, looks: Looks, run: TrainingRun, profile: Profile, replay_every: int
    ) -> None:
        self._cluster, self._looks, self._profile = cluster, looks, profile
        self._tokens = run.spec.trainer.global_batch * run.spec.trainer.seq_len
        self._replay_every, self._told = replay_every, Told()
        self.reported = Step(0)
        self.cadence = run.cadence
        self.step_s = profile.step.value
        self.compute_s: tuple[float, ...] = (0.0,)

    def tell(self, team: Team | None, *, always: bool = False) -> None:
        """Tell of steps, and that somebody watched; unless `always`, only if there is any of it.

        It is told before anything else is.
        """
        now = self._cluster.now
        steps = team is not None and team.pace is not None and team.pace.done(now)
        watched_s = self._looks.unseen_s()
        if not (always or (steps or 0) > self.reported or watched_s > 0):
            return
        self._cluster.out.append(self._telemetry(team) or Tick(at=now, watched_s=watched_s))
        self._looks.told_at = now

    def _telemetry(self, team: Team | None) -> Telemetry | None:
        """Return everything since the last tick; None if nobody was heard."""
        now, heard = self._cluster.now, self._cluster.heard()
        if not heard:
            return None
        reports: tuple[StepReport, ...] = ()
        since_s = 0.0
        if (
            team is not None
            and team.pace is not None
            and len(team.silent(heard)) < len(team.members)
        ):
            since_s = team.pace.since(now)
            done = team.pace.done(now)
            reports = self._reports(self.reported + 1, done)
            self.reported = Step(max(self.reported, done))
        saves = self.cadence.due(reports[0].step, reports[-1].step) if reports else 0
        stall_s = saves * self._profile.stall.value
        trains = team is not None and team.training
        compute_s = self.compute_s if trains else (0.0,)
        replayed = self._replayed(reports)
        news = News(heard, reports, since_s, stall_s, self._looks.unseen_s(), compute_s, replayed)
        return telemetry(team, now, news, self._told)

    def _replayed(self, reports: Sequence[StepReport]) -> Step:
        """Return the newest of some steps in which there was a replay; 0 if there was none.

        It comes out well until somebody tells that it did not: what errs at times mostly does not.
        """
        if not reports or not self._replay_every:
            return Step(0)
        newest = reports[-1].step // self._replay_every * self._replay_every
        return Step(newest if newest >= reports[0].step else 0)

    def _reports(self, first: int, last: Step) -> tuple[StepReport, ...]:
        """Return what there is to tell of steps, both ends included."""
        return tuple(
            StepReport(Step(step), 1.0 / step, 1.0, self._tokens, self.step_s)
            for step in range(first, last + 1)
        )
