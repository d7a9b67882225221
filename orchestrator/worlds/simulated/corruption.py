"""Nodes that compute wrong numbers, which states come of that, and who finds out, and when.

Here is the ground truth; the controller is told no more than an agent would find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from orchestrator.core.events import Reported
from orchestrator.core.journal import Entry
from orchestrator.protocol.ids import Generation, NodeId, Step
from orchestrator.protocol.messages import Ancestor, StateDiverged
from orchestrator.worlds.simulated.cluster import Cluster
from orchestrator.worlds.simulated.team import Team

TELL_AGAIN_S = 1.0
"""A finding that nobody could tell is told again after this."""


class Habit(NamedTuple):
    """In which way a node corrupts, and how it is found."""

    found_after_s: float
    """From the first wrong number to the finding."""
    verified_every: int = 1
    """Steps between those whose state is verified while it is good."""
    proven: bool = True
    """Whether it is proven to be this node; else it is only suspected."""
    named: tuple[NodeId, ...] | None = None
    """Who is named, the most suspected first; None for this node."""
    proof_s: float | None = None
    """From the suspicion until it is proven, if it goes on until then; None for never."""


class Corruption:
    """The corruption of one run.

    Args:
        cluster: the machines.

    Attributes:
        found: called with a node when its wrong numbers are found.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._team: Team | None = None
        self._habits: dict[NodeId, Habit] = {}
        self._wrong: dict[Generation, dict[NodeId, Step]] = {}
        """Of each generation: after which step each node first made it wrong."""
        self._sought: set[NodeId] = set()
        self._told: list[Reported] = []
        self.found: Callable[[NodeId], None] = _nobody

    def wrong(self, generation: Generation) -> dict[NodeId, Step]:
        """Return who made the state of a generation wrong, and after which step."""
        return dict(self._wrong.get(generation, {}))

    @property
    def sought(self) -> frozenset[NodeId]:
        """Nodes that made the state wrong, which nobody has found yet."""
        return frozenset(self._sought)

    def corrupt(self, node: NodeId, habit: Habit) -> None:
        """Have a node compute wrong numbers from now on, whenever it has a seat."""
        self._habits[node] = habit
        team = self._team
        if team is not None and node in team.ranks:
            self._begin(team, node, self._done(team))

    def heal(self, node: NodeId) -> None:
        """Have a node compute right numbers again; states that are wrong stay so."""
        self._habits.pop(node, None)

    def began(self, team: Team, ancestors: Sequence[Ancestor]) -> None:
        """Enter a generation: what it continues may be wrong, and so may its nodes be."""
        self._team = team
        inherited: dict[NodeId, Step] = {}
        for ancestor in ancestors:
            for node, after in self._wrong.get(ancestor.generation, {}).items():
                if after < ancestor.last:
                    inherited[node] = min(after, inherited.get(node, after))
        self._wrong[team.generation] = inherited
        for node in sorted(self._habits.keys() & team.ranks.keys()):
            self._begin(team, node, team.start)

    def resume(self, entries: Sequence[Entry]) -> None:
        """Tell again what the controller that died has not put on record."""
        heard = {e.event.fact for e in entries if isinstance(e.event, Reported)}
        self._told = [told for told in self._told if told.fact not in heard]
        for told in self._told:
            self._cluster.emit(Reported(at=self._cluster.now, node=told.node, fact=told.fact))

    def _begin(self, team: Team, node: NodeId, after: Step) -> None:
        mine = self._wrong[team.generation]
        mine[node] = min(after, mine.get(node, after))
        if node not in self._sought:
            self._sought.add(node)
            habit = self._habits[node]
            self._cluster.agenda.after(habit.found_after_s, partial(self._find, node, habit))

    def _find(self, node: NodeId, habit: Habit) -> None:
        """Have an agent tell that the state is wrong, if it still is."""
        team = self._team
        assert team is not None, "it was made wrong by one"
        after = self._wrong[team.generation].get(node)
        if after is None:
            self._sought.discard(node)
            return
        tellers = [n for n in team.members if n.heard and n.generation == team.generation]
        if not (tellers and self._cluster.listening):
            self._cluster.agenda.after(TELL_AGAIN_S, partial(self._find, node, habit))
            return
        self._sought.discard(node)
        named = (node,) if habit.named is None else habit.named
        found_at = max(self._done(team), after)
        fact = StateDiverged(
            generation=team.generation,
            step=found_at,
            since=Step(after // habit.verified_every * habit.verified_every),
            nodes=named,
            evidence=f"the state after step {found_at} is not what a replay gives",
            proven=habit.proven,
        )
        teller = next((n for n in tellers if n.id != node), tellers[0])
        self.found(node)
        self._told.append(Reported(at=self._cluster.now, node=teller.id, fact=fact))
        self._cluster.emit(self._told[-1])
        if not habit.proven and habit.proof_s is not None:
            self._cluster.agenda.after(habit.proof_s, partial(self._prove, node, habit))

    def _prove(self, node: NodeId, habit: Habit) -> None:
        """Have it be known whose fault it is, if that one still has a seat."""
        team = self._team
        if team is not None and node in team.ranks and node in self._wrong[team.generation]:
            self._find(node, habit._replace(proven=True, named=None))

    def _done(self, team: Team) -> Step:
        return team.start if team.pace is None else team.pace.done(self._cluster.now)


def _nobody(node: NodeId) -> None:
    """Take no interest in a node."""
    del node
