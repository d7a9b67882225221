"""What the hardware of nodes says of itself, short of that they can not be used any more.

A node whose hardware is about to fail, or waits for a reset, gives its seats to a spare when that
costs least, as if somebody had asked for it; once it says so no more, it may be used again. All
else is evidence: it stands beside whatever happens to the node, and moves nothing by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.core.incident import Incident, Note
from orchestrator.core.records import Drain, Node
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.messages import NodeAiling, Symptom

HARDWARE = "hardware"
"""Who asked for a drain, if it was not a person."""
DRAINED_SHARE = 1 / 16
"""Of the nodes of a run that are drained for this at a time, at most, but for one: what all of them
say at once is no device's fault, but a driver's, or the table's. Assumed."""


def take(state: RunState, node: Node, fact: NodeAiling) -> None:
    """Enter what a node's hardware says now. Said again, it changes nothing."""
    known = {_identity(symptom) for symptom in node.symptoms}
    news = [symptom for symptom in fact.symptoms if _identity(symptom) not in known]
    node.symptoms, node.unread, node.lacking = fact.symptoms, fact.unread, fact.lacking
    wanting = [symptom.words for symptom in fact.symptoms if symptom.drain]
    drain = state.drains.get(node.id)
    # Only news: whoever uncordoned the node knew of the rest.
    if any(symptom.drain for symptom in news):
        state.ailed.setdefault(node.id, []).append(state.now)
        if drain is None and _few(state):
            state.drains[node.id] = Drain(
                node=node.id,
                asked_at=state.now,
                by="its hardware",
                reason="; ".join(wanting),
                until=None,
                incarnation=node.incarnation,
                request=HARDWARE,
            )
    elif not wanting and drain is not None and drain.request == HARDWARE:
        del state.drains[node.id]
    if news:
        _tell_incidents(state, node.id)


def _identity(symptom: Symptom) -> tuple[str, str]:
    return symptom.name, symptom.device


def _few(state: RunState) -> bool:
    """Whether not too many nodes are drained for their hardware."""
    drained = sum(drain.request == HARDWARE for drain in state.drains.values())
    return drained < max(int(len(state.nodes) * DRAINED_SHARE), 1)


def words(state: RunState, node: NodeId) -> str:
    """Return what a node's hardware says, in words; "" if it says nothing."""
    return "; ".join(symptom.words for symptom in state.nodes[node].symptoms)


def attach(state: RunState, incident: Incident, nodes: Iterable[NodeId]) -> None:
    """Set down in an incident what the hardware of nodes says that it names."""
    told = {note.text for note in incident.timeline}
    for node in nodes:
        known = state.nodes.get(node)
        for symptom in known.symptoms if known is not None else ():
            text = f"hardware of {node}: {symptom.words}"
            if text not in told:
                incident.timeline.append(Note(at=state.now, text=text))


def _tell_incidents(state: RunState, node: NodeId) -> None:
    """Set it down in what is going on: hardware may say what is wrong after it has shown."""
    measured = {slow.incident for slow in state.slow_unjudged.values()}
    going_on = [i for i in reversed(state.incidents[-RECENT:]) if i.open or i.id in measured]
    for incident in going_on:
        if node in incident.nodes:
            attach(state, incident, (node,))


RECENT = 16
"""Incidents, of which older ones are not looked at again."""
