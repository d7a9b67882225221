"""Keeps track of which shards a node owes the durable tier for a step, and of those it has paid.

Data-parallel replicas hold the same shards, so only the lowest rank with a shard writes it. Pure.
"""

from __future__ import annotations

from orchestrator.agent.impressions import Written
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import Begin, Impression, ShardsStaged, ShardsWritten

STEPS_MAX = 16
"""Steps that may be incomplete at a time; a rank that skips a save leaves one so for ever."""


class Owed:
    """One node's, in one generation. Made anew by `begin`."""

    def __init__(self) -> None:
        self._generation = Generation(0)
        self._ranks: frozenset[Rank] = frozenset()
        self._others: frozenset[Rank] = frozenset()
        """Those whose shards other replicas write."""
        self._staged: dict[Step, dict[Rank, Impression]] = {}
        self._receipts: dict[Step, dict[Rank, Written]] = {}
        self._failed: set[Step] = set()

    def begin(self, order: Begin, node: NodeId) -> None:
        """Start over with the seats of a generation."""
        self._generation = order.generation
        self._ranks = frozenset(order.ranks_of(node)) & frozenset(order.writers)
        self._others = frozenset(order.ranks_of(node)) - self._ranks
        self._receipts, self._staged = {}, {}
        self._failed = set()

    def owes(self, rank: Rank) -> bool:
        """Whether what this rank stages for the durable tier is to be written from here."""
        return rank in self._ranks

    def written(self, rank: Rank, step: Step, written: Written, model: str) -> ShardsWritten | None:
        """Take note of a shard that is durable; return the fact, if it was the last of its step."""
        receipts = self._receipts.setdefault(step, {})
        receipts[rank] = written
        if frozenset(receipts) != self._ranks:
            if len(self._receipts) > STEPS_MAX:
                del self._receipts[next(iter(self._receipts))]
            return None
        del self._receipts[step]
        return ShardsWritten(
            generation=self._generation,
            step=step,
            receipts=tuple(receipts[rank].receipt for rank in sorted(receipts)),
            model=model,
            impressions=tuple(receipts[rank].impression for rank in sorted(receipts)),
        )

    def staged(self, rank: Rank, step: Step, seen: Impression) -> ShardsStaged | None:
        """Take note of what another replica writes; return the fact, if it was the last here."""
        by_rank = self._staged.setdefault(step, {})
        by_rank[rank] = seen
        if frozenset(by_rank) != self._others:
            if len(self._staged) > STEPS_MAX:
                del self._staged[next(iter(self._staged))]
            return None
        del self._staged[step]
        impressions = tuple(by_rank[rank] for rank in sorted(by_rank))
        return ShardsStaged(generation=self._generation, step=step, impressions=impressions)

    def failed(self, step: Step) -> bool:
        """Take note that a write failed, which may be tried again; return whether that is news."""
        news = step not in self._failed
        self._failed.add(step)
        return news
