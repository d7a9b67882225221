"""Makes incidents of what detectors claim: one of all that broke a generation, whoever says it."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core import facts, repairs, slowness, symptoms
from orchestrator.core.events import Event, Telemetry
from orchestrator.core.incident import (
    CORRUPTION,
    LOST,
    REPAIR,
    SLOW_LINK,
    STRAGGLER,
    Cause,
    Finding,
    Incident,
    Note,
)
from orchestrator.core.phases import Bucket, RunPhase
from orchestrator.core.plans import Detector
from orchestrator.core.records import Occurrence, SlowNetwork
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import IncidentId, NodeId, Rank, Seconds

RESTARTED = "controller-restart"
UNBROKEN = (RESTARTED, STRAGGLER, SLOW_LINK, REPAIR)
"""Kinds of incidents that broke nothing: the generation that they name goes on."""
UNJUDGED = "ranks were training; whether they went on is not known yet"
OUTLIVED = "training was not interrupted"
_SEVERITY = {"hang": 1, "crash": 2, "exception": 2, "node-silent": 3, "node-lost": 4}
_SEVERITY[CORRUPTION] = 5
"""Which kind names an incident when several findings belong to it: the one that explains more."""
_Identity = tuple[str, tuple[Rank, ...], tuple[NodeId, ...], str]


class Casebook:
    """Keeps the incidents of one run.

    Args:
        state: of the run; incidents are entered there.
        detectors: asked in this order.

    Attributes:
        disabled: detectors that raised and were switched off, with what they raised.
    """

    def __init__(self, state: RunState, detectors: Sequence[Detector]) -> None:
        self._state = state
        self._detectors = list(detectors)
        self._known: dict[IncidentId, set[_Identity]] = {}
        """What each incident has findings of: a finding that repeats one is no news."""
        self.disabled: dict[str, str] = {}
        self._restart: Incident | None = None
        """The newest death of a controller."""

    def look(self, event: Event) -> None:
        """Ask every detector what is wrong as of now, and enter what they find."""
        self._judge(event)
        for finding in self._detect(event):
            self._admit(finding)

    def note_restart(self, incarnation: int, since: Seconds) -> None:
        """Enter that the controller before `incarnation` ended, having last heard at `since`.

        It is over at once: nothing has to be done about it.
        """
        state = self._state
        incident = self._open(
            Finding(
                at=state.now,
                since=since,
                kind=RESTARTED,
                cause=Cause.SOFTWARE,
                evidence=f"controller {incarnation - 1} ended without ending the run",
                step=state.reached_step,
            )
        )
        self._restart = incident
        incident.rung = "none"
        training = state.phase is RunPhase.TRAINING
        incident.reason = UNJUDGED if training else f"the run was {state.phase}, and goes on so"
        incident.decided_at = incident.resumed_at = state.now

    def _unjudged(self) -> Incident | None:
        """Return the newest death of a controller of which is not known what it did to training."""
        newest = self._restart
        return newest if newest is not None and newest.reason == UNJUDGED else None

    def _judge(self, event: Event) -> None:
        """Say that training outlived a controller, once it is seen to go on."""
        if isinstance(event, Telemetry) and event.reports and event.at > self._state.took_over_at:
            restart = self._unjudged()
            if restart is not None and event.generation == restart.generation:
                restart.reason = OUTLIVED

    def _detect(self, event: Event) -> list[Finding]:
        findings: list[Finding] = []
        for detector in tuple(self._detectors):
            try:
                findings += detector.observe(self._state, event)
            except Exception as error:  # noqa: BLE001 - a broken detector must not stop training
                self._detectors.remove(detector)
                self.disabled[detector.name] = f"{type(error).__name__}: {error}"
        return findings

    def _admit(self, finding: Finding) -> None:
        """Make a finding part of an incident, unless it repeats what is already known."""
        state = self._state
        incident = state.incident
        if finding.kind == "node-silent":
            # Even if the same was found before: it may have been back since.
            for node in finding.nodes:
                facts.give_up(state, node, finding.evidence)
        if self._broke_nothing(finding):
            return
        if finding.generation not in (None, state.generation):
            # What came of it is decided already; who was part of it is worth knowing all the same.
            broken = [
                i
                for i in state.incidents
                if i.generation == finding.generation and i.findings[0].kind not in UNBROKEN
            ]
            if broken:
                self._gather(broken[-1], finding)
            return
        if incident is not None and incident.generation == state.generation:
            if not self._gather(incident, finding):
                return
            if _SEVERITY.get(finding.kind, 0) > _SEVERITY.get(incident.kind, 0):
                incident.kind, incident.cause = finding.kind, finding.cause
        else:
            incident = self._open(finding)
        self._want_generation(finding)

    def _broke_nothing(self, finding: Finding) -> bool:
        """Enter what training goes on after as if nothing was; return whether it is that."""
        if finding.kind == REPAIR:
            self._note_repair(finding)
        elif finding.kind == STRAGGLER:
            slowness.suspect(self._state, self._open(finding))
        elif finding.kind == SLOW_LINK:
            self._note_link(finding)
        else:
            return False
        return True

    def _note_link(self, finding: Finding) -> None:
        """Enter that the way to a node is slow: for somebody to look at, training goes on."""
        incident = self._open(finding)
        incident.rung = "none"
        incident.decided_at = incident.resumed_at = self._state.now
        incident.reason = finding.detail
        if self._state.ways.own(finding.nodes):
            for node in finding.nodes:
                self._blame_network(incident, finding, node)

    def _blame_network(self, incident: Incident, finding: Finding, node: NodeId) -> None:
        """Enter whose network is slow; that it gave up its seats for that once stays known."""
        state = self._state
        known, incarnation = state.slow_networks.get(node), state.nodes[node].incarnation
        state.slow_networks[node] = SlowNetwork(
            incident=incident.id,
            node=node,
            incarnation=incarnation,
            at=finding.at,
            ratio=finding.measure[0],
            left=known is not None and known.left and known.incarnation == incarnation,
        )

    def _note_repair(self, finding: Finding) -> None:
        """Enter that ranks repaired one of them: it is over, and cost a step if one was begun."""
        state = self._state
        incident = self._open(finding)
        incident.rung, incident.reason = finding.rung, finding.detail
        incident.decided_at = incident.resumed_at = state.now
        incident.lost_steps = int(finding.since < finding.at)
        incident.timeline.append(Note(at=state.now, text=finding.detail))
        state.ledger.relabel(finding.since, finding.at, Bucket.LOST_WORK, incident.id)

    def _want_generation(self, finding: Finding) -> None:
        """Have the run brought back, in view of all that is known now."""
        state = self._state
        if finding.signature:
            fault = (finding.signature, finding.step)
            struck = state.occurrences.pop(fault, None) or Occurrence(*fault)
            struck.generations.add(state.generation)
            struck.nodes.update(finding.nodes)
            state.occurrences[fault] = struck
        if not state.wanting:
            state.wanting, state.wanted_since = True, state.now
        state.found = None
        state.search_failure = ""

    def _gather(self, incident: Incident, finding: Finding) -> bool:
        """Add a finding to an incident; return whether it was news."""
        known = self._known[incident.id]
        if _identity(finding) in known:
            return False
        known.add(_identity(finding))
        incident.findings.append(finding)
        self._name(incident, finding)
        incident.timeline.append(Note(at=finding.at, text=f"also {finding.evidence}"))
        return True

    def _open(self, finding: Finding) -> Incident:
        state = self._state
        incident = Incident(
            id=IncidentId(f"inc-{len(state.incidents) + 1}"),
            kind=finding.kind,
            cause=finding.cause,
            generation=state.generation,
            since=finding.since,
            detected_at=finding.at,
            findings=[finding],
            reached_step=state.reached_step,
            timeline=[
                Note(at=finding.since, text=f"began: {finding.evidence}"),
                Note(at=finding.at, text=f"detected after {finding.at - finding.since:.2f} s"),
            ],
        )
        if finding.kind not in UNBROKEN and (restart := self._unjudged()) is not None:
            restart.reason = f"training did not outlive it: {incident.id}"
        if finding.kind not in UNBROKEN and (left := repairs.break_off(state)) is not None:
            incident.timeline.append(left)
        state.incidents.append(incident)
        self._known[incident.id] = {_identity(finding)}
        self._name(incident, finding)
        # While no controller lived, ranks trained on: nothing was lost until it came back.
        # Steps that were made on a corrupted state are lost work.
        if finding.kind not in (*UNBROKEN, CORRUPTION):
            state.ledger.relabel(finding.since, finding.at, Bucket.DETECT, incident.id)
        return incident

    def _name(self, incident: Incident, finding: Finding) -> None:
        """Enter a finding with the nodes that it names; what was announced tells nothing of one."""
        state = self._state
        mark = (finding.kind, finding.signature, finding.step)
        symptoms.attach(state, incident, finding.nodes)
        for node in finding.nodes:
            if node not in state.drains:
                found = state.named.setdefault(node, {}).setdefault(incident.id, {})
                found.setdefault(mark, finding)
        if finding.kind in LOST:
            state.lost_in.setdefault(incident.id, set()).update(finding.nodes)


def _identity(finding: Finding) -> _Identity:
    """Return what makes two findings of one incident the same."""
    return (finding.kind, finding.ranks, finding.nodes, finding.signature)
