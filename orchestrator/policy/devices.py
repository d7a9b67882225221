"""Whose devices are on probation, or under suspicion: they get a seat after everybody else.

A device that was convicted and passed a test since has shown little: all 18 incidents of AEGIS
(OSDI 2026) came back on the same device, and tests pass most of those that corrupt. It is better
than no node, so its node trains when no other is free, and gives its seats up at the next restart
at which one is.
"""

from __future__ import annotations

from orchestrator.core import devices
from orchestrator.core.standing import Standing
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import NodeId


def on_probation(state: RunState) -> frozenset[NodeId]:
    """Return the nodes that are seated only if no other is free."""
    return devices.nodes_in(state, Standing.PROBATION)


def suspected(state: RunState) -> frozenset[NodeId]:
    """Return the nodes that are taken after others that are as good."""
    return devices.nodes_in(state, Standing.SUSPECT)


def standing(state: RunState, node: NodeId) -> str:
    """Return what the ledger has against devices of a node that is not kept out for it, in words.

    "" if there is nothing.
    """
    told = []
    for device in devices.of(state, state.nodes[node]):
        found = devices.standing_of(state, device.serial)
        if found in (Standing.SUSPECT, Standing.PROBATION):
            why = devices.why(state, device.serial)
            told.append(f"{device.kind} {device.serial} is {_words(found)}: {why}")
    return "; ".join(told)


def _words(found: Standing) -> str:
    return "on probation" if found is Standing.PROBATION else "suspect"
