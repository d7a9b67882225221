"""What `holdfast get` lists: for each kind its columns, and its rows as plain objects."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from orchestrator.cli import runs, story, units
from orchestrator.cli.checkpoints import CHECKPOINT
from orchestrator.cli.errors import CliError
from orchestrator.cli.follow import Follower
from orchestrator.cli.tables import Column, Kind, Row, percent, span, text
from orchestrator.core.journal import Entry
from orchestrator.core.records import Node
from orchestrator.core.report import incident_reports
from orchestrator.core.state import RunState
from orchestrator.policy import (
    devices,
    lemons,
    networks,
    planned,
    quarantine,
    stragglers,
    suspicion,
)
from orchestrator.protocol.ids import NodeId, Rank, Step
from orchestrator.protocol.messages import MARKS
from orchestrator.protocol.phases import RankPhase
from orchestrator.worlds.folder import RunFolder


def run_rows() -> list[Row]:
    """Return all runs, the newest first; one whose journal can not be trusted says why."""
    rows = []
    for folder in runs.folders():
        try:
            follower = Follower(folder)
            state, damage = runs.state_of(follower)
            row = run_row(state, folder)
            rows.append(row | {"state": "Damaged", "reason": str(damage)} if damage else row)
        except (CliError, OSError, ValueError) as error:
            rows.append(_unreadable(folder, error))
        except Exception as error:
            if not getattr(error, "hint", ""):
                raise
            rows.append(_unreadable(folder, error))
    return rows


def run_row(state: RunState, folder: RunFolder) -> Row:
    """Return a run as a plain object."""
    return {
        "name": state.run.metadata.name,
        "state": state.end_state or str(state.phase),
        "controller": _controller(state, folder),
        "step": state.reached_step,
        "steps": state.run.spec.trainer.steps,
        "generation": state.generation,
        "nodes": state.run.spec.nodes.count,
        "ranks": state.run.world_size,
        "replicas": state.replicas,
        "incidents": len(state.incidents),
        "ettr": round(state.ledger.effective_ratio, 6),
        "wall_s": state.ledger.end_us / 1e6,
        "tokens_per_s": round(state.tokens_per_s, 3),
        "loss": state.losses.get(state.reached_step),
        "reason": state.end_reason,
        "folder": str(folder.root),
    }


def _controller(state: RunState, folder: RunFolder) -> str:
    if state.phase.final:
        return "ended"
    return "running" if runs.controller_pid(folder) is not None else "gone"


def _unreadable(folder: RunFolder, error: Exception) -> Row:
    row: Row = dict.fromkeys(column.key for column in RUN.columns)
    return row | {
        "name": folder.root.name,
        "state": "Unreadable",
        "reason": str(error),
        "folder": str(folder.root),
    }


def _number(show: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else show(value)


RUN = Kind(
    "run",
    (
        Column("NAME", "name"),
        Column("STATE", "state"),
        Column("CONTROLLER", "controller", text),
        Column("STEP", "step", text),
        Column("STEPS", "steps", text),
        Column("INCIDENTS", "incidents", text),
        Column("ETTR (%)", "ettr", _number(percent)),
        Column("WALL (s)", "wall_s", span),
        Column("LOSS", "loss", _number(lambda value: f"{value:.4f}"), wide=True),
        Column("SPEED (tokens/s)", "tokens_per_s", _number(units.rate), wide=True),
        Column("GENERATION", "generation", text, wide=True),
        Column("NODES", "nodes", text, wide=True),
        Column("RANKS", "ranks", text, wide=True),
        Column("REPLICAS", "replicas", text, wide=True),
        Column("REASON", "reason", text, wide=True),
        Column("FOLDER", "folder", wide=True),
    ),
    lambda state, folder: [run_row(state, folder)],
)


def node_rows(state: RunState, folder: RunFolder) -> list[Row]:
    """Return all nodes that ever joined."""
    del folder
    return [
        {
            "name": node.id,
            "condition": condition(state, node),
            "ranks": list(state.ranks_of(node.id)),
            "generation": node.generation,
            "mark": MARKS[node.mark] if node.generation else None,
            "incarnation": node.incarnation,
            "heard_s": round(state.now - state.hearing.heard_at(node.id), 6),
            "memory_steps": sorted(held_by(state, node.id)),
            "why": why(state, node),
        }
        for _, node in sorted(state.nodes.items())
    ]


def condition(state: RunState, node: Node) -> str:
    """Return the condition of a node in one word; with the run, what it did has ended, too."""
    if state.phase.final and not node.unusable and not node.lost:
        return "Ended"
    told = node.condition(state.seated)
    if node.id in state.quarantined:
        return {"Training": "Quarantined", "Spare": "Quarantined"}.get(told, told)
    if node.id in state.drains:
        return {"Training": "Draining", "Spare": "Drained"}.get(told, told)
    if told == "Spare" and lemons.standing(state, node.id):
        return "Retired"
    return told


def why(state: RunState, node: Node) -> str:
    """Return why a node is in another condition than it might be; "" if it is not."""
    told = (
        node.unusable or node.lost,
        quarantine.standing(state, node.id),
        state.preflights.get(node.id, ""),
        devices.standing(state, node.id),
        planned.standing(state, node.id),
        lemons.standing(state, node.id),
        suspicion.standing(state, node.id),
        stragglers.standing(state, node.id),
        networks.standing(state, node.id),
    )
    return "; ".join(filter(None, told))


def held_by(state: RunState, node: NodeId) -> dict[Step, list[Rank]]:
    """Return the shards in a node's memory: for each step, whose. None once the run is over."""
    held = {} if state.phase.final else state.holdings.held_by(node)
    return {step: sorted(ranks) for step, ranks in held.items()}


NODE = Kind(
    "node",
    (
        Column("NAME", "name"),
        Column("CONDITION", "condition"),
        Column("RANKS", "ranks", text),
        Column("GENERATION", "generation"),
        Column("MARK", "mark", text),
        Column("HEARD (s ago)", "heard_s", span),
        Column("INCARNATION", "incarnation", wide=True),
        Column("IN MEMORY (steps)", "memory_steps", text, wide=True),
        Column("WHY", "why", text, wide=True),
    ),
    node_rows,
)


def rank_rows(state: RunState, folder: RunFolder) -> list[Row]:
    """Return the ranks of the current world, or of the last one."""
    fleet, over = state.fleet, state.phase.final
    return [
        {
            "name": str(rank),
            "rank": rank,
            "node": node,
            "phase": "ended" if over else RankPhase(int(fleet.phase_R[rank])).name.lower(),
            "step": fleet.step_of(Rank(rank)),
            "still_s": None if over else _still_s(state, rank),
            "process": None if over else fleet.state_of(Rank(rank)),
            "cpu_s": round(float(fleet.cpu_s_R[rank]), 3),
            "log": str(folder.rank_log(rank)),
        }
        for rank, node in enumerate(state.seats)
    ]


def _still_s(state: RunState, rank: int) -> float:
    return round(max(state.now - float(state.fleet.moved_at_R[rank]), 0.0), 6)


RANK = Kind(
    "rank",
    (
        Column("RANK", "rank"),
        Column("NODE", "node"),
        Column("PHASE", "phase"),
        Column("STEP", "step"),
        Column("STANDING STILL (s)", "still_s", span),
        Column("PROCESS", "process", text),
        Column("CPU (s)", "cpu_s", span, wide=True),
        Column("LOG", "log", wide=True),
    ),
    rank_rows,
)


def incident_rows(state: RunState, folder: RunFolder) -> list[Row]:
    """Return all incidents, oldest first."""
    del folder
    rows = []
    for incident in incident_reports(state):
        over = incident.first_step_after_s is not None
        rows.append(
            {
                "name": incident.id,
                "kind": incident.kind,
                "state": "Recovered" if over else state.end_state or "Open",
                "cause": incident.cause,
                "suspects": incident.suspects,
                "began_s": incident.began_s,
                "detected_after_s": incident.detected_after_s,
                "decided_after_s": incident.decided_after_s,
                "first_step_after_s": incident.first_step_after_s,
                "rung": incident.rung,
                "lost_steps": incident.lost_steps,
                "false_alarm": incident.false_alarm,
                "evidence": incident.evidence,
                "reason": incident.reason,
            }
        )
    return rows


INCIDENT = Kind(
    "incident",
    (
        Column("NAME", "name"),
        Column("KIND", "kind"),
        Column("STATE", "state"),
        Column("SUSPECTS", "suspects", text),
        Column("BEGAN (h:m:s)", "began_s", units.clock),
        Column("DETECTED (s after)", "detected_after_s", span),
        Column("FIRST STEP (s after)", "first_step_after_s", span),
        Column("RUNG", "rung", text),
        Column("LOST (steps)", "lost_steps"),
        Column("CAUSE", "cause", wide=True),
        Column("DECIDED (s after)", "decided_after_s", span, wide=True),
        Column("REASON", "reason", text, wide=True),
    ),
    incident_rows,
)


class Events:
    """Collects the newest events of a journal while a follower reads it.

    Args:
        tail: how many to keep; None keeps all.
        periodic: whether telemetry and ticks that led to nothing count.
    """

    def __init__(self, tail: int | None, *, periodic: bool) -> None:
        self._rows: deque[Row] = deque(maxlen=tail)
        self._periodic = periodic

    def take(self, entry: Entry) -> None:
        """Take in one entry of the journal."""
        event = entry.event
        if story.periodic(event) and not entry.decisions and not self._periodic:
            return
        self._rows.append(
            {
                "name": str(entry.seq),
                "at_s": event.at,
                "kind": story.kind(event),
                "node": story.node(event),
                "text": story.words(event),
                "decisions": [story.decision(decision) for decision in entry.decisions],
            }
        )

    def rows(self, state: RunState, folder: RunFolder) -> list[Row]:
        """Return what was kept, oldest first."""
        del state, folder
        return list(self._rows)


EVENT_COLUMNS = (
    Column("SEQ", "name"),
    Column("AT (h:m:s)", "at_s", units.clock),
    Column("KIND", "kind"),
    Column("NODE", "node", text),
    Column("WHAT", "text"),
    Column("DECISIONS", "decisions", lambda value: "; ".join(value) or "-", wide=True),
)

KINDS = {
    "runs": RUN,
    "nodes": NODE,
    "ranks": RANK,
    "incidents": INCIDENT,
    "checkpoints": CHECKPOINT,
}
"""What can be listed besides events, which need to be collected while the journal is read."""
