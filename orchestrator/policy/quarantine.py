"""Who is taken out when the state was corrupted: whoever may have done it, before anybody knows.

To find out takes hours: one node took more than eight of offline stress (ByteRobust, arXiv
2509.16293), and tests miss most of what corrupts (AEGIS, OSDI 2026). A swap takes under a minute.
So suspects leave at once as far as there are spares, and are diagnosed outside the run. Whoever is
proven to have done it (core.quarantine), or is suspected a second time within days, gets no seat
with or without a spare: two findings are two evidences, unless they name everybody.
"""

from __future__ import annotations

import numpy as np

from orchestrator.core.incident import CORRUPTION, Finding, Incident
from orchestrator.core.plans import End, Plan, Quarantine
from orchestrator.core.state import RunState
from orchestrator.policy.arithmetic import DAY_S
from orchestrator.policy.switches import QUARANTINE_FIRST, enabled
from orchestrator.protocol.ids import NodeId

AGAIN_DAYS = 7
"""A corruption that comes back this soon is the same one. Source: AEGIS: all of 18 incidents came
back on the same device, seconds to days apart."""
CROWD_SHARE = 1 / 16
"""Of the nodes of a run, of which more than one are named at once: that tells against nobody."""


def take_out(state: RunState) -> Plan | None:
    """Quarantine who is suspected of having corrupted the state."""
    left = [node for node in state.suspects if node not in state.quarantined]
    if not left:
        return None
    again = [node for node in left if _suspected_before(state, node)]
    nodes = again + _as_far_as_spares_allow(state, again, [n for n in left if n not in again])
    if not nodes:
        return None
    why = "suspected of silent corruption"
    if again:
        why += f", {', '.join(sorted(again))} for the second time"
    return Quarantine(nodes=tuple(nodes), reason=f"{why}: {state.diverged[-1].evidence}")


def _as_far_as_spares_allow(
    state: RunState, again: list[NodeId], first: list[NodeId]
) -> list[NodeId]:
    """Return which of the nodes that are suspected for the first time leave, besides the others."""
    if not enabled(state, QUARANTINE_FIRST):
        return []
    spares = len(set(state.spares()).difference(state.suspects))
    vacant = (state.unfit | state.cordoned() | set(again)) & state.seated.keys()
    leaving = []
    for node in first:
        seats = {node} & state.seated.keys() - vacant
        if not seats or len(vacant) < spares:
            leaving.append(node)
            vacant |= seats
    return leaving


def stop_unlocated(state: RunState) -> Plan | None:
    """End a run whose state is corrupted again, and again nobody stands out."""
    incident = state.incident
    # Whoever stands out is out the second time, so that comes to an end by itself.
    if incident is None or not state.diverged or _accuses(state, incident):
        return None
    before = [
        former
        for former in state.incidents
        if former is not incident
        and _is_corruption(former)
        and set(former.nodes) == set(incident.nodes)
        and state.now - former.detected_at <= AGAIN_DAYS * DAY_S
    ]
    if not before:
        return None
    return End(
        state="Failed",
        reason=f"silent corruption in {before[-1].id} and again in {incident.id}, within "
        f"{AGAIN_DAYS} days, and nobody stands out who could be taken out for it; last: "
        f"{incident.findings[-1].evidence}\nhint: checkpoints up to the last step that is known to "
        "be good are kept; test the nodes, and run it again on those that pass",
    )


def standing(state: RunState, node: NodeId) -> str:
    """Return why a node is quarantined, in words; "" if it is not."""
    known = state.quarantined.get(node)
    return f"quarantined, {known.why}" if known is not None else ""


def _suspected_before(state: RunState, node: NodeId) -> bool:
    """Whether another incident named a node for the same, not long ago and not with a crowd."""
    present = state.incident.id if state.incident is not None else None
    return any(
        finding.kind == CORRUPTION
        and state.now - finding.at <= AGAIN_DAYS * DAY_S
        and not _crowd(state, finding)
        for incident, found in state.named.get(node, {}).items()
        for finding in found.values()
        if incident != present
    )


def _accuses(state: RunState, incident: Incident) -> bool:
    """Whether somebody stands out among those that an incident names."""
    return any(finding.nodes and not _crowd(state, finding) for finding in incident.findings)


def _crowd(state: RunState, finding: Finding) -> bool:
    """Whether a finding names so many that it tells against none of them: of two that differ.

    Once all but one of those are out, and it goes on, it is the one.
    """
    if len(set(finding.nodes) - state.quarantined.keys()) < 2:
        return False
    return len(finding.nodes) > len(state.nodes) * CROWD_SHARE or _all_holders(state, finding)


def _all_holders(state: RunState, finding: Finding) -> bool:
    """Whether everybody is named who holds some shard."""
    shards = state.run.layout.shards()[: len(state.seats)]
    others = np.ones(len(shards), np.bool_)
    others[[rank for rank in finding.ranks if rank < len(shards)]] = False
    return len(np.unique(shards[others])) < len(np.unique(shards))


def _is_corruption(incident: Incident) -> bool:
    return any(finding.kind == CORRUPTION for finding in incident.findings)
