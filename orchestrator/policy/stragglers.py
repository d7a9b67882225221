"""When a node with a slow device gives its seats to a spare: when what it costs exceeds the swap.

All ranks wait for the slowest, so a node that takes a tenth longer costs the whole world nearly a
tenth. Nothing is lost by a swap at the right moment but the time of a restart. How long a device
stays slow nobody knows, and most do so for minutes. So one is swapped once it has cost as much as a
swap does: whoever waits for that, and no longer, loses at most twice what the best choice would
have cost, however long it lasts. With hardly a step left it is kept. Only what a probe found slow
is swapped: more work is no node's fault.
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


class Worth(NamedTuple):
    """What it costs to keep a slow node, and to swap it, in seconds of the whole world."""

    keep_s: float
    swap_s: float

    @property
    def pays(self) -> bool:
        """Whether to swap it costs less."""
        return self.keep_s > self.swap_s


def worth(state: RunState, slow: Slow) -> Worth:
    """Return what to keep a slow node costs from now on, and what to swap it costs.

    It is taken to stay slow for as long again as it has been found to be, in this generation.
    """
    steps_left = state.run.spec.trainer.steps - state.reached_step
    lasts_s = min(state.now - slow.since, steps_left * state.step_times.quantile(0.5))
    return Worth(keep_s=slow.share * lasts_s, swap_s=restart_s(state))


def found_slow(state: RunState) -> dict[NodeId, Slow]:
    """Return the nodes whose device was measured to be slow, lately."""
    if not state.slow or not enabled(state, STRAGGLER_SWAP):
        return {}
    return slowness.nodes_of(state, "hardware", Seconds(state.now - ASIDE_DAYS * DAY_S))


def leaving(state: RunState) -> tuple[NodeId, ...]:
    """Return slow nodes of the world that are worth a restart, as far as spares are better.

    Not those that are known to be as fast as their peers by now; of the first steps of a generation
    nobody knows, and what is restarted for another reason takes along who was slow before it.
    """
    # Asked at every event: that nobody with a seat was ever found slow is the cheaper half of it.
    if not any(
        slow.verdict == "hardware" and slow.node in state.seated for slow in state.slow.values()
    ):
        return ()
    found = found_slow(state)
    pays = [
        slow for slow in found.values() if slow.node in state.seated and worth(state, slow).pays
    ]
    if not pays:
        return ()
    better = sum(spare not in found for spare in state.spares())
    if not better:
        return ()
    pays = [slow for slow in pays if _may_be_slow(state, slow)]
    pays.sort(key=lambda slow: (-slow.share, slow.node))
    return tuple(slow.node for slow in pays[:better])


def _may_be_slow(state: RunState, slow: Slow) -> bool:
    ratio = slowness.now(state, slow.node)
    return ratio is None or ratio - 1 >= STILL * (slow.ratio - 1)


def surely(state: RunState, node: NodeId) -> bool:
    """Whether a node that was found slow is so in the present generation as well."""
    return slowness.now(state, node) is not None


def reason(state: RunState, node: NodeId) -> str:
    """Return why a slow node leaves, with the arithmetic."""
    slow = found_slow(state)[node]
    cost = worth(state, slow)
    return (
        f"{node} is slow ({slow.incident}: {slow.ratio:.2f} times its peers' time): to keep it "
        f"costs {100 * slow.share:.0f} % of every step, {cost.keep_s:.1f} s if that lasts as long "
        f"again as it has, or to the end; to swap it {cost.swap_s:.1f} s"
    )


def standing(state: RunState, node: NodeId) -> str:
    """Return what is known of a slow node, in words; "" if it is not slow."""
    slow = found_slow(state).get(node)
    if slow is None:
        return ""
    words = f"slow, {slow.ratio:.2f} times its peers' time ({slow.incident}); {slow.words}"
    if node not in state.seated:
        return f"{words}; a spare of last resort"
    cost = worth(state, slow)
    if not _may_be_slow(state, slow):
        return f"{words}; kept: by now it is about as fast as its peers"
    if not cost.pays:
        return f"{words}; kept: that costs {cost.keep_s:.0f} s, a swap {cost.swap_s:.0f} s"
    if node in leaving(state):
        return f"{words}; waiting for the next step in memory, to be swapped"
    return f"{words}; waiting for a spare that is not slow"
