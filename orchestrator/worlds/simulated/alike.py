"""What all nodes of a world hold alike: noted once, and entered at each of them when it matters.

Between two faults thousands of nodes save thousands of times, every one the same. Nobody looks at
what a node holds until something happens to one of them; then, before it does, all of it is
entered where it would be.
"""

from __future__ import annotations

from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.worlds.simulated.cluster import TOGETHER_MIN, Cluster
from orchestrator.worlds.simulated.node import SAVES_MAX, Save
from orchestrator.worlds.simulated.team import Team


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
            team = self._team
            self._answer = len(team.members) >= TOGETHER_MIN and all(
                node.heard
                and node.generation == team.generation
                and team.buddy_of(node.id) in team.ranks
                for node in team.members
            )
        return self._answer

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
        for node in self._team.members if newest else ():
            if len(newest) == SAVES_MAX:
                has = node.judge.has
                node.shelf = {save: shares[node.id] for save, shares in newest if has(save)}
                continue
            for save, shares in newest:
                node.put(save, shares[node.id])
        self._retained, self._saves = None, {}

    def _share(self, *, copied: bool) -> dict[NodeId, frozenset[Rank]]:
        """Return whose shards each node holds of a save."""
        if copied not in self._shares:
            own = {node: frozenset(ranks) for node, ranks in self._team.ranks.items()}
            shares = dict(own)
            for node in own if copied else ():
                buddy = self._team.buddy_of(node)
                assert buddy is not None, "asked only while everybody has one"
                shares[buddy] |= own[node]
            self._shares[copied] = shares
        return self._shares[copied]
