"""When a node with a slow device gives its seats to a spare: when what it costs exceeds the swap.

All ranks wait for the slowest, so a node that takes a tenth longer costs the whole world nearly a
tenth, unless another is slower still. Nothing is lost by a swap at the right moment but the time of
a restart. How long a device stays slow nobody knows, and most do so for minutes. So nodes are
swapped once they have cost as much as a swap does: whoever waits for that, and no longer, loses at
most twice what the best choice would have cost, however long it lasts. With hardly a step left they
are kept. Only what a probe found slow is swapped: more work is no node's fault.
"""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.core import slowness
from orchestrator.core.records import Slow
from orchestrator.core.state import RunState
from orchestrator.policy.arithmetic import DAY_S
from orchestrator.policy.restarts import restart_s
from orchestrator.policy.switches import STRAGGLER_SWAP, enabled
from orchestrator.protocol.ids import NodeId, Seconds

STILL = 0.5
"""Share of its slowness that a device has to have kept to be swapped for it. Half: what is between
is as far from the one as from the other."""
ASIDE_DAYS = 7
"""For how long who was found slow is the last to be taken. Assumed."""


class Group(NamedTuple):
    """Slow nodes that leave together or not at all, and what either costs the whole world."""

    slows: tuple[Slow, ...]
    share: float
    """Of every step, what they cost."""
    keep_s: float
    swap_s: float

    @property
    def pays(self) -> bool:
        """Whether to swap them costs less than to keep them."""
        return self.keep_s > self.swap_s


def groups(state: RunState) -> list[Group]:
    """Return the slow nodes of the world, the slowest first, as they are worth a swap together.

    To be rid of the slowest brings nothing while another is hardly faster, and that one costs
    nothing beside it: what a node costs is what is gained once it and all that are slower are gone.
    So they gather, from the slowest on, until what they cost pays for a restart. Only the last
    group may not pay yet.
    """
    slows = [
        slow
        for slow in found_slow(state).values()
        if slow.node in state.seated and _may_be_slow(state, slow)
    ]
    if not slows:
        return []
    swap_s, found, first, share, keep_s = restart_s(state), [], 0, 0.0, 0.0
    costs = slowness.shares(state, slows)
    for count, (slow, own_share) in enumerate(costs, 1):
        share += own_share
        keep_s += own_share * _lasts_s(state, slow)
        if keep_s > swap_s or count == len(costs):
            together = tuple(slow for slow, _ in costs[first:count])
            found.append(Group(together, share, keep_s, swap_s))
            first, share, keep_s = count, 0.0, 0.0
    return found


def _lasts_s(state: RunState, slow: Slow) -> float:
    """Return for how long a node is taken to stay slow: as long again as it has been found to."""
    steps_left = state.run.spec.trainer.steps - state.reached_step
    return min(state.now - slow.since, max(steps_left, 0) * state.step_times.quantile(0.5))


def found_slow(state: RunState) -> dict[NodeId, Slow]:
    """Return the nodes whose device was measured to be slow, lately."""
    if not state.slow or not enabled(state, STRAGGLER_SWAP):
        return {}
    return slowness.slow_since(state, Seconds(state.now - ASIDE_DAYS * DAY_S))


def leaving(state: RunState) -> tuple[NodeId, ...]:
    """Return slow nodes of the world that are worth a restart, as far as spares are better.

    Not those that are known to be as fast as their peers by now; of the first steps of a generation
    nobody knows, and what is restarted for another reason takes along who was slow before it.
    """
    # Asked at every event: while all are as fast as each other, nobody is slow who was once.
    if state.paces.alike or not any(node in state.seated for node in state.slow_devices):
        return ()
    paying = [group for group in groups(state) if group.pays]
    if not paying:
        return ()
    found = found_slow(state)
    better = sum(spare not in found for spare in state.spares())
    nodes: list[NodeId] = []
    for group in paying:
        # A part of a group is worth nothing.
        if len(nodes) + len(group.slows) > better:
            break
        nodes += [slow.node for slow in group.slows]
    return tuple(nodes)


def _may_be_slow(state: RunState, slow: Slow) -> bool:
    ratio = slowness.now(state, slow)
    return ratio is None or ratio - 1 >= STILL * (slow.ratio - 1)


def surely(state: RunState) -> bool:
    """Whether it is known of the present generation, too, who is slow and who is not."""
    return state.paces.alike or state.paces.full


def reason(state: RunState, node: NodeId) -> str:
    """Return why a slow node leaves, with the arithmetic."""
    group = _group_of(state, node)
    (slow,) = (slow for slow in group.slows if slow.node == node)
    beside = [f" and {other.node}" for other in group.slows if other is not slow]
    return (
        f"{node} is slow ({slow.incident}: {slow.ratio:.2f} times its peers' time): to keep it"
        f"{''.join(beside)} costs {100 * group.share:.0f} % of every step, {group.keep_s:.1f} s if "
        f"that lasts as long again as it has, or to the end; to swap it {group.swap_s:.1f} s"
    )


def _group_of(state: RunState, node: NodeId) -> Group:
    return next(g for g in groups(state) if any(slow.node == node for slow in g.slows))


def standing(state: RunState, node: NodeId) -> str:
    """Return what is known of a slow node, in words; "" if it is not slow."""
    slow = found_slow(state).get(node)
    if slow is None:
        return ""
    words = f"slow, {slow.ratio:.2f} times its peers' time ({slow.incident}); {slow.words}"
    if node not in state.seated:
        return f"{words}; a spare of last resort"
    if not _may_be_slow(state, slow):
        return f"{words}; kept: by now it is about as fast as its peers"
    group = _group_of(state, node)
    if not group.pays:
        return f"{words}; kept: that costs {group.keep_s:.0f} s, a swap {group.swap_s:.0f} s"
    if node in leaving(state):
        return f"{words}; waiting for the next step in memory, to be swapped"
    return f"{words}; waiting for {_spares(group)}"


def _spares(group: Group) -> str:
    count = len(group.slows)
    if count == 1:
        return "a spare that is not slow"
    return f"{count} spares that are not slow: {count} nodes are about as slow as each other"
