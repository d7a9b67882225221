"""Finds nodes of the world that are gone: known to be lost, unusable, or not heard for too long."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.events import (
    ControllerStarted,
    Event,
    NodeDisconnected,
    NodeLost,
    Reported,
    Telemetry,
    Tick,
)
from orchestrator.core.incident import Cause, Finding
from orchestrator.core.records import Node
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Seconds
from orchestrator.protocol.messages import Joined, NodeUnusable


class Silence:
    """A node that nobody hears is lost, whatever its ranks may still be doing.

    So is what a node ran whose agent is another one than before, however well the node is.
    """

    name = "silence"

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return one finding per node of the world that is gone."""
        if not _telling(state, event):
            return []
        findings = []
        silent = state.hearing.silent(state.now)
        amiss = (state.unfit | state.reborn | silent) & state.seated.keys()
        for name in sorted(amiss, key=lambda node: state.seated[node][0]):
            node = state.nodes[name]
            if node.unusable:
                findings.append(_gone(state, node, "node-lost", Cause.HARDWARE, node.unusable))
            elif node.lost:
                # Found silent before: the finding that said so is the one that counts.
                if not node.lost.endswith(_SILENT):
                    findings.append(_gone(state, node, "node-lost", Cause.HARDWARE, node.lost))
            elif node.reborn and name not in silent:
                findings.append(_reborn(state, node))
            elif name in silent:
                # Also one that was reborn, and is gone again before it had its seats back.
                quiet_s = state.now - state.hearing.heard_at(name)
                text = f"{name} not heard for {quiet_s:.1f} s, limit {state.timeouts.silence_s:g} s"
                findings.append(
                    _gone(state, node, "node-silent", Cause.NETWORK, f"{text}{_SILENT}")
                )
        return findings


_SILENT = "; taken for lost"
_OF_TIME = (Telemetry, Tick, NodeLost, NodeDisconnected, ControllerStarted)


def _telling(state: RunState, event: Event) -> bool:
    """Whether a node may be gone that was not before: asked of every event, of thousands."""
    if isinstance(event, Reported) and isinstance(event.fact, Joined | NodeUnusable):
        return event.node in state.seated
    return isinstance(event, _OF_TIME)


def _reborn(state: RunState, node: Node) -> Finding:
    if node.died_after >= state.took_over_at:
        return _gone(state, node, "node-lost", Cause.HARDWARE, node.reborn)
    # Whoever ended the controller may have ended the agent; it says nothing about the machine.
    words = f"{node.reborn}, while no controller was there to see why"
    return _gone(state, node, "node-lost", Cause.UNKNOWN, words)


def _since(state: RunState, node: Node) -> Seconds:
    """Return when it began: when the node was heard last.

    If nobody looked for a while after that, not before the last step that is known of.
    """
    spoke_at = node.died_after if node.reborn else state.hearing.spoke_at(node.id)
    if not node.reborn and state.hearing.heard_at(node.id) == spoke_at:
        return spoke_at
    stepped_at = state.step_log[-1][1] if state.step_log else spoke_at
    return Seconds(min(max(spoke_at, stepped_at), state.now))


def _gone(state: RunState, node: Node, kind: str, cause: Cause, evidence: str) -> Finding:
    return Finding(
        at=state.now,
        since=_since(state, node),
        kind=kind,
        cause=cause,
        ranks=state.ranks_of(node.id),
        nodes=(node.id,),
        step=state.reached_step,
        evidence=evidence,
    )
