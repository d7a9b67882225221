"""When a node with a slow network gives its seats to a spare: when what it costs exceeds the swap.

Copies of its shards are slow on both of its ways; whether the collectives of training are, nobody
sees. But if the time of a step in which nobody computes has grown since its ways became slow, and
no other way is slow, then that growth is what it costs all. It is swapped once it has cost as much
as a swap does, like a slow device (policy.stragglers), and once only: if steps wait as long on
another node, it was not to blame. Where it is that of a node or of its buddy, both leave, or the
next generation, whatever it is begun for, has them copy to others (policy.placement).
"""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.core.records import SlowNetwork
from orchestrator.core.state import RunState
from orchestrator.core.ways import Waited
from orchestrator.policy import stragglers
from orchestrator.policy.arithmetic import DAY_S
from orchestrator.policy.restarts import restart_s
from orchestrator.policy.switches import LINK_SWAP, enabled
from orchestrator.protocol.ids import NodeId


class Cost(NamedTuple):
    """What a slow network costs, and what it takes to be rid of it."""

    waited: Waited
    keep_s: float
    swap_s: float

    @property
    def pays(self) -> bool:
        """Whether to swap the node costs less than to keep it."""
        return self.keep_s > self.swap_s


def found_slow(state: RunState) -> dict[NodeId, SlowNetwork]:
    """Return the nodes whose network was found to be slow, lately, by the agent they have."""
    if not state.slow_networks or not enabled(state, LINK_SWAP):
        return {}
    since = state.now - stragglers.ASIDE_DAYS * DAY_S
    return {
        node: found
        for node, found in state.slow_networks.items()
        if found.at >= since and state.nodes[node].incarnation == found.incarnation
    }


def paired(state: RunState) -> frozenset[NodeId]:
    """Return the nodes of which one of two has a slow network, each being the other's buddy."""
    found, to = found_slow(state), state.buddies
    pairs = [(node, to[node]) for node in found if to.get(to.get(node, node)) == node]
    return frozenset(node for node, other in pairs if not_told_apart(state, node, other))


def not_told_apart(state: RunState, node: NodeId, other: NodeId) -> bool:
    """Whether the network of one of two nodes is slow, that were each other's buddy."""
    found = found_slow(state)
    return node in found and other in found


def leaving(state: RunState) -> tuple[NodeId, ...]:
    """Return the node of the world whose network is worth a restart, as far as spares are better.

    Two if it is not known which: they leave together or not at all, at the cost of one restart.
    """
    nodes = _culprits(state)
    if not nodes or _better(state) < len(nodes):
        return ()
    cost = _cost(state)
    return nodes if cost is not None and cost.pays else ()


def _culprits(state: RunState) -> tuple[NodeId, ...]:
    """Return whose network is slow now; nobody if one gave up its seats for that before."""
    if state.ways.slow_since is None or not state.slow_networks:
        return ()
    nodes, known = state.ways.culprits(), found_slow(state)
    if all(n in known and not known[n].left and n in state.seated for n in nodes):
        return nodes
    return ()


def _better(state: RunState) -> int:
    """Return how many spares there are that are not slow themselves."""
    slow = found_slow(state).keys() | stragglers.found_slow(state).keys()
    return sum(spare not in slow for spare in state.spares())


def _cost(state: RunState) -> Cost | None:
    """Return what the slow ways cost; None while that is not known, or nothing has grown."""
    waited, since = state.ways.waited(), state.ways.slow_since
    step_s = state.step_times.quantile(0.5)
    if waited is None or since is None or not waited.grown or step_s <= 0:
        return None
    steps_left = max(state.run.spec.trainer.steps - state.reached_step, 0)
    lasts_s = min(state.now - since, steps_left * step_s)
    share = min((waited.now_s - waited.before_s) / step_s, 1.0)
    return Cost(waited, share * lasts_s, restart_s(state))


def reason(state: RunState, node: NodeId) -> str:
    """Return why a node with a slow network leaves, with the arithmetic."""
    found, cost = state.slow_networks[node], _cost(state)
    assert cost is not None
    return (
        f"the network of {_whose(state, node)} is slow ({found.incident}: copies take "
        f"{found.ratio:.1f} times as long both ways), and {_grown(cost.waited)}: to keep it costs "
        f"{cost.keep_s:.1f} s if that lasts as long again as it has, or to the end; to swap it "
        f"{cost.swap_s:.1f} s"
    )


def _whose(state: RunState, node: NodeId) -> str:
    other = [each for each in state.ways.culprits() if each != node]
    return f"{node} or {other[0]}" if other else node


def _grown(waited: Waited) -> str:
    return f"nobody computes for {waited.now_s:.3g} s of a step, {waited.before_s:.3g} s before"


def standing(state: RunState, node: NodeId) -> str:
    """Return what is known of a node with a slow network, in words; "" if it has none."""
    found = found_slow(state).get(node)
    if found is None:
        return ""
    words = f"slow network, copies took {found.ratio:.1f} times as long both ways"
    words = f"{words} ({found.incident})"
    if node not in state.seated:
        return f"{words}; a spare of last resort"
    if found.left:
        return f"{words}; kept: it gave up its seats for that once"
    if node not in _culprits(state):
        return f"{words}; kept: by now it is not slow both ways, or others are slow, too"
    return f"{words}; {_weighed(state)}"


def _weighed(state: RunState) -> str:
    """Return what becomes of a node whose network is slow now, and why."""
    cost = _cost(state)
    if cost is None:
        return "kept: it is not known that steps wait for it"
    grown = _grown(cost.waited)
    if not cost.pays:
        return f"{grown}; kept: that costs {cost.keep_s:.0f} s, a swap {cost.swap_s:.0f} s"
    count = len(_culprits(state))
    if _better(state) < count:
        spares = f"{count} spares that are not slow" if count > 1 else "a spare that is not slow"
        return f"{grown}; waiting for {spares}"
    return f"{grown}; waiting for the next step in memory, to be swapped"
