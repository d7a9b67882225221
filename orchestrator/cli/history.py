"""What a state has forgotten and a journal has not: collected while a follower reads it."""

from __future__ import annotations

from orchestrator.cli import story, units
from orchestrator.core.decisions import (
    CommitCheckpoint,
    DisconnectNode,
    FenceNode,
    JudgeDevice,
    PreflightDevices,
    StartGeneration,
)
from orchestrator.core.events import (
    CheckpointJudged,
    ControllerStarted,
    DrainCancelled,
    DrainRequested,
    FaultInjected,
    Inherited,
    NodeDisconnected,
    NodeLost,
    Reported,
    StopRequested,
)
from orchestrator.core.journal import Entry
from orchestrator.protocol.ids import NodeId, Seconds, Step
from orchestrator.protocol.messages import (
    Joined,
    NodeAiling,
    NodeUnusable,
    Preflighted,
    PreparationFailed,
    Prepared,
    RankExited,
    RanksTroubled,
    WriteFailed,
)

Line = tuple[Seconds, str]
LINES_MAX = 100_000
_TOLD = ControllerStarted | FaultInjected | Inherited | NodeDisconnected | NodeLost | StopRequested
_TOLD_FACTS = (
    Joined
    | NodeAiling
    | NodeUnusable
    | Preflighted
    | PreparationFailed
    | Prepared
    | RankExited
    | RanksTroubled
    | WriteFailed
)


class History:
    """Milestones of a run, in the order in which they became known.

    Attributes:
        commits: the order that published each checkpoint, by step.
        verdicts: what was put on record about checkpoints, oldest first.
    """

    def __init__(self) -> None:
        self.commits: dict[Step, CommitCheckpoint] = {}
        self.verdicts: list[CheckpointJudged] = []
        self._lines: list[tuple[Seconds, NodeId | None, str]] = []

        self._now = Seconds(0.0)

    def take(self, entry: Entry) -> None:
        """Take in an entry, after those before it."""
        event = entry.event
        self._now = Seconds(max(event.at, self._now))
        if isinstance(event, CheckpointJudged):
            self.verdicts.append(event)
        if isinstance(event, _TOLD) or (
            isinstance(event, Reported) and isinstance(event.fact, _TOLD_FACTS)
        ):
            self._add(story.node(event), units.first_line(story.words(event)))
        if isinstance(event, DrainRequested | DrainCancelled):
            for node in event.nodes:
                self._add(node, units.first_line(story.words(event)))
        for decision in entry.decisions:
            if isinstance(decision, CommitCheckpoint):
                self.commits[decision.step] = decision
            if isinstance(decision, FenceNode | DisconnectNode | JudgeDevice | PreflightDevices):
                self._add(decision.node, story.decision(decision))
            if isinstance(decision, StartGeneration):
                world = ", ".join(dict.fromkeys(decision.seats))
                self._add("", f"generation {decision.generation} ordered on {world}")

    def _add(self, node: str, text: str) -> None:
        if len(self._lines) < LINES_MAX:
            self._lines.append((self._now, NodeId(node) if node else None, text))

    def of_node(self, node: NodeId) -> list[Line]:
        """Return what happened to one node."""
        return [(at, text) for at, name, text in self._lines if name == node]

    def between(self, start: Seconds, end: Seconds) -> list[Line]:
        """Return what happened from `start` to `end`, both included."""
        return [(at, text) for at, _, text in self._lines if start <= at <= end]
