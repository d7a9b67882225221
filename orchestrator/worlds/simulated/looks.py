"""When to look at a simulated cluster: every moment while anything is amiss, else hardly ever.

Between two looks nothing happens that the controller does not know: who looks says for how long it
watched. `tests/simulation/test_quiet_looks.py` shows that a run comes out the same.
"""

from __future__ import annotations

from orchestrator.protocol.ids import NodeId, Seconds
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worlds.simulated.cluster import Cluster
from orchestrator.worlds.simulated.team import Team

FOUND_WITHIN_S, WAITING_LOOK_S = 120.0, 30.0
"""A generation that broke is looked at every moment for so long, and after that now and then."""
_ROUNDING = 1e-6
_NEVER_YET = Seconds(float("-inf"))


class Looks:
    """Over one cluster.

    Args:
        cluster: the machines.
        timeouts: of the run.
        quiet_s: between two looks while nothing is amiss, seconds; a tick at least.
        run: how many ranks and nodes it has.

    Attributes:
        to_be_free: nodes that wait for the moment at which memory comes to have a newer step.
        slow: nodes that were measured to be slow, and from when until when they may come to wait
            for the same if there is a spare: who has not been slow for long is kept.
        told_at: when the controller was told anything by a look.
    """

    def __init__(
        self, cluster: Cluster, timeouts: Timeouts, quiet_s: float, run: TrainingRun
    ) -> None:
        self._cluster, self._timeouts = cluster, timeouts
        self._ranks, self._nodes_more = run.world_size, run.block.nodes
        self._quiet_s = max(quiet_s, timeouts.tick_s)
        self._looked_at = Seconds(cluster.now - timeouts.tick_s)
        self.told_at = cluster.now
        self._close_until = Seconds(0.0)
        self._broken_at: Seconds | None = None
        self.to_be_free: set[NodeId] = set()
        self.slow: dict[NodeId, tuple[Seconds, Seconds]] = {}

    def looked(self) -> None:
        """Enter that somebody looks just now."""
        self._looked_at = self._cluster.now

    def begin(self) -> None:
        """Enter that a new generation was ordered: nothing is known to be wrong with it."""
        self._broken_at = None

    def look_soon(self) -> None:
        """See to it that steps which are done are known within a tick."""
        self.look_closely(self._timeouts.tick_s)

    def look_closely(self, seconds: float) -> None:
        """See to it that everything is seen for a while."""
        until = Seconds(self._cluster.now + seconds)
        self._close_until = max(self._close_until, until)

    def unseen_s(self) -> float:
        """Return for how long nobody has been told anything, if that is longer than a tick."""
        quiet_s = self._cluster.now - self.told_at
        return quiet_s if quiet_s > self._timeouts.tick_s * (1 + _ROUNDING) else 0.0

    def next_at(self, team: Team | None) -> Seconds:
        """Return when to look again."""
        every_s = self._quiet_s
        if self._is_close(team):
            every_s = self._timeouts.tick_s
        elif not _goes_well(team):
            # What there was to find has been found; the run waits, maybe for days, for a node.
            every_s = min(WAITING_LOOK_S, every_s)
        soon = [at for at, _ in self.slow.values() if at > self._cluster.now]
        return Seconds(min([self._looked_at + every_s, *soon]))

    def _is_close(self, team: Team | None) -> bool:
        """Whether the controller has to see each moment, to find what it does not know yet."""
        now = self._cluster.now
        if self._quiet_s <= self._timeouts.tick_s or now < self._close_until:
            return True
        # For so long that the controller can not but know.
        within_s = 3 * self._timeouts.silence_s
        # Asked at every look, of all that were ever lost and are not back: the newest will do.
        if now - max(self._cluster.unexplained.values(), default=_NEVER_YET) < within_s:
            return True
        if _goes_well(team):
            self._broken_at = None
            # A restart that may choose its moment is waited for, and only while the world trains.
            return team is not None and (
                not self.to_be_free.isdisjoint(team.ranks)
                or (self._may_swap(team) and bool(self._idle(team)))
                or self._can_grow(team)
            )
        if self._broken_at is None:
            self._broken_at = now
        return now - self._broken_at < FOUND_WITHIN_S

    def _may_swap(self, team: Team) -> bool:
        now = self._cluster.now
        return any(at <= now < to and node in team.ranks for node, (at, to) in self.slow.items())

    def _can_grow(self, team: Team) -> bool:
        """Whether it has too few replicas, and nodes wait for the moment at which it has more."""
        if len(team.seats) == self._ranks:
            return False
        # A slow node is better than none.
        free = team.idle(self._cluster.heard()).difference(self.to_be_free)
        return len(free) >= self._nodes_more

    def _idle(self, team: Team) -> frozenset[NodeId]:
        """Return the nodes that have no seat, and that nobody wants to be free or knows as slow."""
        return team.idle(self._cluster.heard()).difference(self.to_be_free, self.slow)


def _goes_well(team: Team | None) -> bool:
    """Whether the newest generation trains, or is about to."""
    return team is None or (team.whole and (team.training or team.going_on))
