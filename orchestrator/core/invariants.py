"""What holds of every state that a controller is in, whatever it was told."""

from __future__ import annotations

from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Generation


def violations(state: RunState) -> list[str]:
    """Return every invariant that the state breaks; empty for a sound one. For tests and replay."""
    broken = []
    replicas, rest = divmod(len(state.seats), state.shard_count())
    full, least = state.run.spec.parallelism.dp_replicate, state.run.least_replicas
    if state.seats and (rest or not least <= replicas <= full):
        broken.append(
            f"world has {len(state.seats)} seats, run has {least} to {full} replicas of "
            f"{state.shard_count()} ranks"
        )
    per_node = state.run.spec.nodes.ranks_per_node
    crowded = [n for n, ranks in state.seated.items() if len(ranks) != per_node]
    if crowded:
        broken.append(f"not {per_node} ranks each: {', '.join(crowded)}")
    if sum(state.ledger.totals().values()) != state.ledger.end_us:
        broken.append("ledger buckets do not sum to the wall clock")
    if state.unfit != {node.id for node in state.nodes.values() if not node.usable}:
        broken.append("which nodes are usable was not kept up")
    if any(budget.spent < 0 for budget in state.budgets.values()):
        broken.append("a budget has more than its limit left")
    if state.phase.final and not state.end_state:
        broken.append(f"phase is {state.phase} without an end")
    newest = max((c.epoch for c in state.commits), default=Generation(0))
    # While a generation is wanted, what a search found may be of an earlier life of the run.
    if newest > state.generation and not state.wanting:
        broken.append(f"a commit has epoch {newest}, the run is at {state.generation}")
    return broken
