"""Which nodes fail far more often than others, and are not relied on while there are others.

A lemon passes its tests: what tells is that it fails again. A node that has failed more often in a
window than a sound one ever would is retired. It gets a seat only if no other node is free, and
gives it up at the next restart at which one is. Nothing condemns it: it is better than no node.
Repairs take nothing back: nodes come from them as likely to fail as before, or more (SuperBench).

Of the seven signals by which Kokolis et al. (arXiv 2410.21680) tell lemons, those count that one
run can see. Its failures with other nodes of the world (multi_node_node_fails; of a run of one node
single_node_node_fails) and how often it was taken out (out_count): being lost, silent or unusable,
alone. Its Xids (xid_cnt), as far as a table says that they matter: a node that is unusable for them
is lost, and one that is to be drained for what its hardware says counts as having failed. What is
not seen from within a run: repair tickets (in part: the device ledger bars what was convicted),
which users avoid it (excl_jobid_count), and its rate in runs of one node against that of others
(single_node_node_failure_rate).
"""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.core.incident import LOST, Cause, Finding
from orchestrator.core.records import Occurrence
from orchestrator.core.state import RunState
from orchestrator.policy.arithmetic import DAY_S, poisson_quantile
from orchestrator.policy.switches import LEMON_RETIREMENT, enabled
from orchestrator.protocol.ids import IncidentId, NodeId

WINDOW_DAYS = 28
"""Source: Kokolis et al., arXiv 2410.21680: of the nodes that failures within 28 days named, more
than 85 % were lemons; these were 1.2 % of the nodes."""
FAILURES_PER_NODE_DAY = 419 / (2048 * 54)
"""Of a sound node, at most. Source: Llama 3, arXiv 2407.21783, Table 5: all 419 unexpected
interruptions of 2,048 nodes in 54 days, those that were the job's own or a lemon's included."""
SOUND = 0.999
"""Share of the sound nodes that are not retired within a window, at least. With lemons that are
1.2 % of the nodes and fail 20 times as often (assumed), 96 % of what is retired are some."""


def limit() -> int:
    """Return how many failures within the window retire a node: one more than a sound one has.

    >>> limit()
    3
    """
    return poisson_quantile(FAILURES_PER_NODE_DAY * WINDOW_DAYS, SOUND) + 1


LIMIT = limit()


def retired(state: RunState) -> frozenset[NodeId]:
    """Return the nodes that failed too often to be relied on."""
    if not enabled(state, LEMON_RETIREMENT):
        return frozenset()
    # Nearly no node was named by so many, and only of those there is anything to look at.
    often = [
        node
        for node, named in state.named.items()
        if len(named) + len(state.ailed.get(node, ())) >= LIMIT
    ]
    often += [node for node in state.ailed if node not in state.named]
    return frozenset(node for node in often if failures(state, node) >= LIMIT)


def failures(state: RunState, node: NodeId) -> int:
    """Return how many incidents within the window tell against a node, its hardware's included."""
    since = state.now - WINDOW_DAYS * DAY_S
    ailed = sum(at >= since for at in state.ailed.get(node, ()))
    return ailed + sum(
        any(f.at >= since and _tells(state, node, incident, f) for f in found.values())
        for incident, found in state.named.get(node, {}).items()
    )


def standing(state: RunState, node: NodeId) -> str:
    """Return why a node is retired, in words; "" if it is not."""
    # Asked of single nodes: what all the others did is beside the point.
    if not enabled(state, LEMON_RETIREMENT) or (count := failures(state, node)) < LIMIT:
        return ""
    return f"retired: {count} failures in {WINDOW_DAYS} days, limit {LIMIT}"


def repeated(state: RunState) -> Iterator[Occurrence]:
    """Return the faults that struck more than once, and one node only."""
    return (fault for fault in state.occurrences.values() if _is_repeated(fault))


def _is_repeated(fault: Occurrence) -> bool:
    return len(fault.generations) > 1 and len(fault.nodes) == 1


def _tells(state: RunState, node: NodeId, incident: IncidentId, finding: Finding) -> bool:
    """Whether a finding is the node's own failure, as far as can be told."""
    if finding.kind in LOST:
        # Several at once are one failure of what they share: a switch, a power supply.
        alone = len(state.lost_in[incident]) == 1
        return alone and finding.cause in (Cause.HARDWARE, Cause.NETWORK)
    if not finding.signature:
        return False
    # One crash may be the job's fault; the same one again, here and nowhere else, is not.
    same = state.occurrences.get((finding.signature, finding.step))
    return same is not None and _is_repeated(same) and node in same.nodes
