"""One incident, for somebody who was just woken up: what broke, how we know, what it cost."""

from __future__ import annotations

from orchestrator.cli import units
from orchestrator.cli.blocks import section
from orchestrator.cli.history import History
from orchestrator.core.incident import (
    BUDGET_OF,
    BY_RANKS,
    COPIED,
    RECOMPUTED,
    REDONE,
    Incident,
    rank_words,
)
from orchestrator.core.phases import Bucket
from orchestrator.core.report import IncidentReport, incident_reports
from orchestrator.core.state import RunState

RUNGS = {
    COPIED: "ranks saw it before a step used it, and gave one of them what the others hold; "
    "nothing had to be restarted",
    REDONE: "ranks saw it before a step had moved anything, all hold the same, and computed that "
    "step anew; nothing had to be restarted",
    RECOMPUTED: "a rank computes a part of its update twice, on other lanes of its device; it came "
    "out otherwise, was computed a third time, and what came out twice is kept",
    "none": "ranks went on training by themselves; nothing had to be restarted",
    "restart in place": "every node looks well, so ranks start again where they were, from warm "
    "processes, with the state that is in memory",
    "swap for a spare": "a node is gone or blamed, and a spare is free; its ranks' state comes "
    "from the copy on another node",
    "over-eviction": "ranks hung or lost each other again, and nobody knows for certain whose "
    "fault it is; whom the evidence points to gave their seats to spares, and are spares now",
    "shrink": "a node is gone and none is free; the replicas that are left go on with the same "
    "batch, slower, from what is in memory, and good nodes of the others are spares",
    "grow back": "nodes are free again for replicas that were missing; the state comes from "
    "memory, at the moment at which least has to be done again",
    "planned swap": "a node is to be free, and a spare is; the state comes from memory, at "
    "the moment at which least has to be done again",
    "roll back before the onset": "what came after the last step that is known to be good may be "
    "corrupted; the newest state before that is taken, wherever it is",
    "resume from the durable tier": "no whole copy is left in memory, so the newest verified "
    "checkpoint is read",
    "start over from the seed": "there is no state to continue from that is whole and trusted, "
    "neither in memory nor on the durable tier",
    "stop": "starting again could not help, or was tried too often",
}
"""When each rung of the ladder is taken."""
RUNBOOK = "docs/runbook.md"
PLACES_MAX = 8
"""Places where ranks stood that are shown."""
FRAMES_SHOWN = 4
"""Functions of ranks that nobody suspects: enough to see that they wait, and for what."""
LINES_MAX = 60
"""Lines of a time line; of a longer one the middle is left out."""
ABOVE = "what broke, above"
LONG = 60
"""Characters of evidence that are not worth reading twice."""


def incident_lines(index: int, state: RunState, history: History) -> list[str]:
    """Describe an incident: what, evidence, suspects, what was done and why, cost, time line."""
    incident = state.incidents[index]
    told = incident_reports(state)[index]
    return [
        f"{incident.id}: {incident.kind}, {_outcome(incident, state)}",
        *section("What broke", [finding.evidence for finding in incident.findings[:1]]),
        *section("Suspects", [incident.suspects()]),
        *section("Cause", [f"{incident.cause} ({_payment(incident, state)})"]),
        *section("How we know", _evidence(incident, told)),
        *section("Where ranks stood, innermost function first", _places(incident)),
        *section("What was done", _done(incident, state)),
        *section("What it cost", _cost(incident, told)),
        *section("Time line, from when it began", _timeline(incident, state, history)),
        *section("Look next", _next(incident, state)),
    ]


def _outcome(incident: Incident, state: RunState) -> str:
    if incident.resumed_at is not None:
        if incident.rung == "none":
            return f"over; {units.first_line(incident.reason)}"
        return f"over; training again after {units.seconds(incident.resumed_at - incident.since)}"
    if state.end_state:
        return f"ended the run ({state.end_state})"
    return f"OPEN for {units.seconds(state.now - incident.since)}; the run is {state.phase}"


def _payment(incident: Incident, state: RunState) -> str:
    """Say what was paid: a restart costs one of a budget, and nothing else does."""
    if incident.rung in ("none", "stop", *BY_RANKS) or incident.cause not in BUDGET_OF:
        return "nothing was paid"
    return f"{'paid' if incident.rung else 'to be paid'} from the {_budget(incident, state)}"


def _budget(incident: Incident, state: RunState) -> str:
    origin = BUDGET_OF[incident.cause]
    budget = state.budgets[origin]
    return f"{origin} budget, {budget.left} of {budget.limit} restarts left"


def _evidence(incident: Incident, told: IncidentReport) -> list[str]:
    lines = []
    for finding in incident.findings:
        noticed = units.seconds(finding.at - finding.since)
        evidence = _once(finding.evidence, incident)
        lines.append(f"{finding.kind}, noticed after {noticed}: {evidence}")
        if finding.signature:
            lines.append(f"  signature: {finding.signature} (after step {finding.step})")
        lines += [f"  | {line}" for line in finding.detail.splitlines()]
    lines += [f"it was planned: fault {index} of the fault plan" for index in told.faults]
    if told.false_alarm:
        lines.append("nothing was injected and no process died: this may be a false alarm")
    return lines


def _places(incident: Incident) -> list[str]:
    """Say where ranks stood; of places with no suspect only the innermost functions."""
    lines: list[str] = []
    for stack in incident.stacks[:PLACES_MAX]:
        suspected = set(stack.ranks) & set(incident.ranks)
        lines.append(", ".join(rank_words(stack.ranks)) + (", suspected:" if suspected else ":"))
        lines += [f"  | {frame}" for frame in stack.frames[: None if suspected else FRAMES_SHOWN]]
    if len(incident.stacks) > PLACES_MAX:
        lines.append(f"... and {len(incident.stacks) - PLACES_MAX} more places")
    lines += [f"{node}: not known: {why}" for node, why in sorted(incident.unseen.items())]
    return lines


def _done(incident: Incident, state: RunState) -> list[str]:
    if not incident.rung:
        return [f"nothing yet; the run is {state.phase}"]
    lines = [incident.rung + (f": {RUNGS[incident.rung]}" if incident.rung in RUNGS else "")]
    if incident.reason:
        lines.append(f"because {_once(incident.reason, incident)}")
    if incident.quarantined:
        lines.append(f"quarantined: {', '.join(incident.quarantined)}")
    if incident.evicted:
        lines.append(f"put aside, not condemned: {', '.join(incident.evicted)}")
    if incident.restored_step is not None:
        lines.append(f"continued from step {incident.restored_step}: {incident.restored_from}")
    return lines


def _cost(incident: Incident, told: IncidentReport) -> list[str]:
    lines = [f"{units.count(told.lost_steps, 'step')} done again"]
    if told.lost_steps and incident.restored_step is not None:
        first, last = incident.restored_step + 1, incident.reached_step
        lines[0] += f" ({first})" if first == last else f" ({first} to {last})"
    whole = sum(told.ledger.values())
    lines.append(f"{units.seconds(whole)} in all" + (", of which" if whole else ""))
    lines += [
        f"  {MEANING[bucket]:<46} {units.seconds(spent):>12}"
        for bucket, spent in told.ledger.items()
    ]
    return lines


MEANING = {
    str(Bucket.EFFECTIVE): "effective: steps of the final result",
    str(Bucket.LOST_WORK): "lost_work: steps that are done again",
    str(Bucket.LOST_CAPACITY): "lost_capacity: replicas were missing",
    str(Bucket.CHECKPOINT_STALL): "checkpoint_stall: waiting for saves",
    str(Bucket.STARTUP): "startup: before the first step of the run",
    str(Bucket.DETECT): "detect: until it was noticed",
    str(Bucket.DECIDE): "decide: searching checkpoints",
    str(Bucket.BACKOFF): "backoff: pausing before a restart",
    str(Bucket.WAIT_FOR_NODES): "wait_for_nodes: too few nodes",
    str(Bucket.STOP): "stop: ending the old generation",
    str(Bucket.START): "start: processes and state in place",
    str(Bucket.RENDEZVOUS): "rendezvous: process groups form",
    str(Bucket.RESTORE): "restore: ranks read their state",
    str(Bucket.FIRST_STEP): "first_step: the first step again",
    str(Bucket.SHUTDOWN): "shutdown: after the last step",
}


def _timeline(incident: Incident, state: RunState, history: History) -> list[str]:
    end = incident.resumed_at if incident.resumed_at is not None else state.now
    lines = [(note.at, _short(note.text, incident)) for note in incident.timeline]
    known = {text for _, text in lines}
    lines += [(at, text) for at, text in history.between(incident.since, end) if text not in known]
    lines += [(at, f"run is {phase}") for at, phase in state.phases if incident.since <= at <= end]
    lines += [
        (at, f"planned fault: {text}")
        for at, text, _ in state.injected.values()
        if incident.since - state.timeouts.detect_within_s <= at < incident.since
    ]
    lines.sort(key=lambda line: line[0])
    left_out = len(lines) - LINES_MAX
    told = [f"{at - incident.since:+10.3f} s  {units.clock(at)}  {text}" for at, text in lines]
    if left_out > 0:
        told[LINES_MAX // 2 : LINES_MAX // 2 + left_out] = [
            f"{'...':>12}  {left_out} lines: holdfast get events --run {state.run.metadata.name}"
        ]
    return told


def _short(text: str, incident: Incident) -> str:
    """Return a note without the reason, which stands above in full."""
    if incident.reason:
        text = text.replace(incident.reason, incident.rung)
    return units.first_line(_once(text, incident))


def _once(text: str, incident: Incident) -> str:
    """Return a text without the evidence that the description begins with, if that is long."""
    first = incident.findings[0].evidence
    return text.replace(first, ABOVE) if len(first) > LONG else text


def _next(incident: Incident, state: RunState) -> list[str]:
    name = state.run.metadata.name
    lines = [f"{RUNBOOK}#{incident.kind}"]
    lines += [f"holdfast logs {name} --rank {rank} --tail 100" for rank in incident.ranks[:4]]
    lines += [f"holdfast describe node {node} --run {name}" for node in incident.nodes[:4]]
    return lines
