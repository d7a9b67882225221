"""What all nodes of a world hold alike: noted once, and entered at each of them when it matters.

Between two faults thousands of nodes save thousands of times, every one the same. Nobody looks at
what a node holds until something happens to one of them; then, before it does, all of it is
entered where it would be.
"""

from __future__ import annotations

from functools import lru_cache

from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.worlds.simulated.cluster import TOGETHER_MIN, Cluster
from orchestrator.worlds.simulated.node import SAVES_MAX, Judge, Save
from orchestrator.worlds.simulated.team import Team

_Shares = tuple[frozenset[Rank], ...]


class Alike:
    """Of one team.

    Args:
        cluster: the machines.
        team: whose nodes they are.
    """

    def __init__(self, cluster: Cluster, team: Team) -> None:
        self._cluster, self._team = cluster, team
        self._saves: dict[Save, bool] = {}
        """Staged by all, the newest ones; whether buddies have it, too."""
        self._retained: tuple[Generation, Step] | None = None
        self._asked_at = -1
        self._answer = False
        self._shares: dict[bool, dict[NodeId, frozenset[Rank]]] = {}

    @property
    def possible(self) -> bool:
        """Whether nodes do the same as of now: they are many, all there, and each other's buddy."""
        # Nodes that are still about to begin are no disturbance, and will have.
        if not self._answer or self._asked_at != self._cluster.disturbances:
            self._asked_at = self._cluster.disturbances
            self._answer = len(self._team.members) >= TOGETHER_MIN and self._all_do()
        return self._answer

    def _all_do(self) -> bool:
        team = self._team
        generation, there, buddy_of = team.generation, team.ranks, team.buddy_of
        for node in team.members:
            if node.generation != generation or not node.heard or buddy_of(node.id) not in there:
                return False
        return True

    def stage(self, save: Save) -> None:
        """Have every node hold its ranks' shards."""
        self._saves[save] = False
        for old in sorted(self._saves)[:-SAVES_MAX]:
            del self._saves[old]

    def copy(self, save: Save) -> bool:
        """Have every buddy hold a save that all have staged; return whether there is one."""
        if save not in self._saves:
            return False
        self._saves[save] = True
        return True

    def retain(self, generation: Generation, step: Step) -> None:
        """Have every node drop what is older than `step`."""
        self._retained = (generation, step)

    def enter(self) -> None:
        """Enter at each node what has been noted."""
        newest = [(save, self._share(copied=self._saves[save])) for save in sorted(self._saves)]
        if self._retained is not None:
            generation, step = self._retained
            for node in self._cluster.nodes.values():
                if node.heard and node.generation <= generation:
                    # What is put there anew needs not be looked through before.
                    kept = len(newest) == SAVES_MAX and node.id in self._team.ranks
                    node.retain(step, drop=not kept)
        if len(newest) == SAVES_MAX:
            self._refill(newest)
        else:
            for save, shares in newest:
                for node in self._team.members:
                    node.put(save, shares[node.id])
        self._retained, self._saves = None, {}

    def _refill(self, saves: list[tuple[Save, dict[NodeId, frozenset[Rank]]]]) -> None:
        """Have every node hold these and nothing else, as far as they count there."""
        counting: dict[Judge, list[tuple[Save, dict[NodeId, frozenset[Rank]]]]] = {}
        for node in self._team.members:
            if node.judge not in counting:
                counting[node.judge] = [each for each in saves if node.judge.has(each[0])]
            name = node.id
            node.shelf = {save: shares[name] for save, shares in counting[node.judge]}

    def _share(self, *, copied: bool) -> dict[NodeId, frozenset[Rank]]:
        """Return whose shards each node holds of a save."""
        if copied not in self._shares:
            team = self._team
            places = {node: place for place, node in enumerate(team.ranks)}
            buddies = [team.buddy_of(node) for node in team.ranks]
            kept_by = tuple(places[buddy] for buddy in buddies if buddy is not None)
            assert len(kept_by) == len(places), "asked only while everybody has one"
            own, both = _shares(tuple(team.ranks.values()), kept_by)
            self._shares[copied] = dict(zip(team.ranks, both if copied else own, strict=True))
        return self._shares[copied]


@lru_cache(maxsize=2)
def _shares(ranks: tuple[tuple[Rank, ...], ...], kept_by: tuple[int, ...]) -> tuple[_Shares, ...]:
    """Return what each place holds of its own, and with what it keeps for others.

    One node in place of another changes neither.

    Args:
        ranks: of each place.
        kept_by: the place that keeps a copy of each.
    """
    own = [frozenset(each) for each in ranks]
    both = list(own)
    for place, buddy in enumerate(kept_by):
        both[buddy] |= own[place]
    return tuple(own), tuple(both)
