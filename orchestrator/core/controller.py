"""The controller: the one pure object that decides.

`handle(event)` is the only thing that changes the state, and it returns what is to be done. It
never asks for the time, for chance or for I/O; the same events give the same decisions, byte for
byte. It runs in five strokes: account for the time that passed, apply the fact, ask the
detectors, ask the policies if a generation is wanted, and ask to be woken.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core import facts, patience, saving
from orchestrator.core.decisions import (
    AnnounceRendezvous,
    CarryOutFault,
    Decision,
    DisconnectNode,
    EndRun,
    FenceNode,
    SearchCheckpoints,
    StartGeneration,
    WakeAt,
)
from orchestrator.core.events import (
    ControllerStarted,
    Event,
    FaultInjected,
    Reported,
    StopRequested,
    Telemetry,
)
from orchestrator.core.fleet import Fleet
from orchestrator.core.incident import BUDGET_OF, Cause, Finding, Incident, Note
from orchestrator.core.lineage import continued
from orchestrator.core.phases import BUCKET_OF, PHASE_OF_MARK, Bucket, RunPhase, require
from orchestrator.core.plans import (
    Detector,
    End,
    Pause,
    Plan,
    Policy,
    Restart,
    Search,
    WaitForNodes,
)
from orchestrator.core.state import Budget, Occurrence, RunState, decide
from orchestrator.protocol.ids import Generation, IncidentId, NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import MARKS, Ancestor, Joined, RendezvousOffered
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import Timeouts

BLIND_BEATS = 3
"""A gap of this many beats between two events means that nobody was looking, not that all hung."""
_RESTARTED = "controller-restart"
UNJUDGED = "ranks were training; whether they went on is not known yet"
OUTLIVED = "training was not interrupted"
_MARK_STEPPED = MARKS.index("stepped")
_MARK_FINISHED = MARKS.index("finished")


_Mark = tuple[str, tuple[Rank, ...], tuple[NodeId, ...], str]


class Controller:
    """Decides for one run."""

    def __init__(
        self,
        run: TrainingRun,
        timeouts: Timeouts,
        detectors: Sequence[Detector],
        policies: Sequence[Policy],
    ) -> None:
        recovery = run.spec.recovery
        self.state = RunState(run=run, timeouts=timeouts)
        self.state.budgets = {
            "hardware": Budget(recovery.hardware_budget),
            "software": Budget(recovery.software_budget),
            "preemption": Budget(recovery.preemption_budget),
        }
        self._detectors = list(detectors)
        self._policies = tuple(policies)
        self._started: StartGeneration | None = None
        self._heard_before = Seconds(0.0)
        """When the event before the present one was."""
        self._known: dict[IncidentId, set[_Mark]] = {}
        """What each incident has findings of: a finding that repeats one is no news."""
        self._waking: Seconds | None = None
        """When the next search is due, if it was asked to be woken for one."""
        self.disabled: dict[str, str] = {}
        """Detectors that raised and were switched off, with what they raised."""

    def handle(self, event: Event) -> list[Decision]:
        """Take in one event; return what is to be done about it, in order."""
        state = self.state
        if state.phase.final:
            return []
        self._account(event)
        decisions: list[Decision] = []
        facts.apply(state, event)
        facts.give_up_search(state)
        decisions += self._answer(event)
        for finding in self._detect(event):
            self._admit(finding)
        self._judge(event)
        decisions += self._hang_up()
        decisions += saving.save(state)
        self._advance()
        if isinstance(event, StopRequested):
            decisions += self._end("Stopped", f"stopped by {event.by}")
        elif self._complete():
            decisions += self._end("Succeeded", self._completion())
        elif state.wanting and not self._concluding():
            decisions += self._recover()
        elif state.phase is RunPhase.FINISHING:
            decisions += self._finish()
        return decisions

    # Time -----------------------------------------------------------------------------------

    def _account(self, event: Event) -> None:
        """Charge the time since the last event, and forgive the ranks for what nobody saw."""
        state = self.state
        # A world's clock does not run backwards, but two of its threads may stamp out of order.
        at = Seconds(max(event.at, state.now))
        bucket = BUCKET_OF[state.phase]
        incident = state.incident.id if state.incident else None
        if state.best_step == 0 and all(i.kind == _RESTARTED for i in state.incidents):
            bucket = Bucket.STARTUP
        state.ledger.charge(at, bucket, incident)
        gap = at - state.now
        self._heard_before, state.now = state.now, at
        if gap > BLIND_BEATS * state.timeouts.beat_s or isinstance(event, ControllerStarted):
            patience.forgive(state, gap)

    # Facts that are answered at once ----------------------------------------------------------

    def _answer(self, event: Event) -> list[Decision]:
        """Bring a (re)connected node up to date; pass on a rendezvous; repeat orders."""
        state = self.state
        decisions: list[Decision] = []
        match event:
            case Reported(node=node, fact=Joined() as joined):
                decisions += self._catch_up(node, joined)
            case Reported(fact=RendezvousOffered(generation=generation, address=address)):
                if generation == state.generation and address != state.offered:
                    state.offered = address
                    decisions.append(self._announce())
            case FaultInjected(index=index, description=text, node=node):
                decisions.append(
                    decide(state, CarryOutFault, f"planned: {text}", index=index, node=node)
                )
            case ControllerStarted(incarnation=incarnation) if incarnation > 1:
                decisions += self._take_over(incarnation)
            case _:
                pass
        return decisions

    def _hang_up(self) -> list[Decision]:
        """Have nodes call again that are not heard on the connection they have."""
        limit_s = self.state.timeouts.silence_s
        return [
            decide(self.state, DisconnectNode, f"{node} not heard for {limit_s:g} s", node=node)
            for node in facts.disconnect_silent(self.state)
        ]

    def _catch_up(self, node: NodeId, joined: Joined) -> list[Decision]:
        state = self.state
        decisions: list[Decision] = []
        # What was reborn waits for the next generation: in this one its seats are taken.
        behind = joined.generation < state.generation and not state.nodes[node].reborn
        if behind and self._started is not None:
            if node in state.seats and not state.wanting and not state.nodes[node].lost:
                decisions.append(self._started)
            else:
                decisions.append(
                    FenceNode(
                        generation=state.generation,
                        node=node,
                        reason=f"{node} comes from generation {joined.generation} and has no seat "
                        f"in {state.generation}",
                    )
                )
        if joined.generation == state.generation and joined.offered and not state.offered:
            state.offered = joined.offered
        if node in state.seats and state.offered:
            decisions.append(self._announce())
        return decisions

    def _announce(self) -> AnnounceRendezvous:
        return AnnounceRendezvous(
            generation=self.state.generation,
            address=self.state.offered,
            reason="rank 0 offers the store of this generation",
        )

    def _take_over(self, incarnation: int) -> list[Decision]:
        """Record the predecessor's death and repeat what it may have ordered in vain."""
        state = self.state
        incident = self._open(
            Finding(
                at=state.now,
                since=self._heard_before,
                kind=_RESTARTED,
                cause=Cause.SOFTWARE,
                evidence=f"controller {incarnation - 1} ended without ending the run",
                step=state.reached_step,
            )
        )
        incident.rung = "none"
        training = state.phase is RunPhase.TRAINING
        incident.reason = UNJUDGED if training else f"the run was {state.phase}, and goes on so"
        incident.decided_at = incident.resumed_at = state.now
        decisions: list[Decision] = [
            saving.commit_decision(state, step) for step in sorted(state.committing)
        ]
        # Not by the phase: nodes that are not back yet may have moved it on.
        if state.asked_at is not None:
            decisions.append(self._search("asked again by the next controller"))
        return decisions

    def _unjudged(self) -> Incident | None:
        """Return the newest death of a controller of which is not known what it did to training."""
        waiting = (i for i in reversed(self.state.incidents) if i.kind == _RESTARTED)
        newest = next(waiting, None)
        return newest if newest is not None and newest.reason == UNJUDGED else None

    def _judge(self, event: Event) -> None:
        """Say that training outlived a controller, once it is seen to go on."""
        if isinstance(event, Telemetry) and event.reports and event.at > self.state.took_over_at:
            restart = self._unjudged()
            if restart is not None and event.generation == restart.generation:
                restart.reason = OUTLIVED

    # Detecting --------------------------------------------------------------------------------

    def _detect(self, event: Event) -> list[Finding]:
        findings: list[Finding] = []
        for detector in tuple(self._detectors):
            try:
                findings += detector.observe(self.state, event)
            except Exception as error:  # noqa: BLE001 - a broken detector must not stop training
                self._detectors.remove(detector)
                self.disabled[detector.name] = f"{type(error).__name__}: {error}"
        return findings

    def _admit(self, finding: Finding) -> None:
        """Make a finding part of an incident, unless it repeats what is already known."""
        state = self.state
        incident = state.incident
        if finding.kind == "node-silent":
            # Even if the same was found before: it may have been back since.
            for node in finding.nodes:
                facts.give_up(state, node, finding.evidence)
        if finding.generation not in (None, state.generation):
            # What came of it is decided already; who was part of it is worth knowing all the same.
            broken = [
                i
                for i in state.incidents
                if i.generation == finding.generation and i.findings[0].kind != _RESTARTED
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
        if _mark(finding) in known:
            return False
        known.add(_mark(finding))
        incident.findings.append(finding)
        incident.timeline.append(Note(at=finding.at, text=f"also {finding.evidence}"))
        return True

    def _open(self, finding: Finding) -> Incident:
        state = self.state
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
        if finding.kind != _RESTARTED and (restart := self._unjudged()) is not None:
            restart.reason = f"training did not outlive it: {incident.id}"
        state.incidents.append(incident)
        self._known[incident.id] = {_mark(finding)}
        # While no controller lived, ranks trained on: nothing was lost until it came back.
        if finding.kind != _RESTARTED:
            state.ledger.relabel(finding.since, finding.at, Bucket.DETECT, incident.id)
        return incident

    # Recovering -------------------------------------------------------------------------------

    def _recover(self) -> list[Decision]:
        for policy in self._policies:
            plan = policy(self.state)
            if plan is not None:
                return self._follow(plan)
        raise AssertionError("no policy answered; the last one must always")

    def _follow(self, plan: Plan) -> list[Decision]:
        state = self.state
        match plan:
            case End(state=end, reason=reason):
                return self._end(end, reason)
            case Pause(until=until, reason=reason):
                state.pause_until = until
                return self._wait(RunPhase.BACKING_OFF, until, reason)
            case WaitForNodes(until=until, reason=reason):
                return self._wait(RunPhase.GATHERING, until, reason)
            case Search():
                return self._look(plan)
            case Restart():
                return self._restart(plan)

    def _wait(self, phase: RunPhase, until: Seconds, reason: str) -> list[Decision]:
        if self.state.phase is phase:
            return []
        self._enter(phase)
        self._note(reason)
        return [decide(self.state, WakeAt, reason, at=until)]

    def _look(self, plan: Search) -> list[Decision]:
        """Search when it is time to, unless an answer is still due."""
        state = self.state
        if state.phase is not RunPhase.SEARCHING:
            self._enter(RunPhase.SEARCHING)
        if state.asked_at is not None:
            return []
        if plan.at is None or state.now >= plan.at:
            return [self._search(plan.reason)]
        if plan.at == self._waking:
            return []
        self._waking = plan.at
        return [decide(state, WakeAt, plan.reason, at=plan.at)]

    def _search(self, reason: str) -> SearchCheckpoints:
        self.state.asked_at = self.state.now
        return decide(self.state, SearchCheckpoints, reason)

    def _restart(self, plan: Restart) -> list[Decision]:
        state = self.state
        # Advanced now, not when the new world reports: what is left of the old one is fenced
        # from this moment, however long it takes to die.
        # Above those of former lives, and above every epoch in the store: keys are taken also by
        # what was rejected, or never committed.
        seen = state.found.epoch_seen if state.found else Generation(0)
        newest = max([state.former_generation, seen, *(c.epoch for c in state.commits)])
        state.ancestors = _ancestors(state, plan)
        state.generation = Generation(max(state.generation, newest) + 1)
        restored = plan.restore.step if plan.restore else Step(0)
        self._write_off(plan, restored)
        facts.reset_for_generation(state, plan.seats, plan.restore)
        state.fleet = Fleet(state.run.world_size, state.now)
        state.wanting = False
        state.found = state.asked_at = None
        state.search_failure, state.search_failures = "", 0
        state.pause_until = None
        state.rungs[plan.rung] = state.rungs.get(plan.rung, 0) + 1
        if state.incident is not None:
            state.budgets[BUDGET_OF[state.incident.cause]].spent += 1
            state.futile_restarts += 1
        self._enter(RunPhase.STOPPING)
        new = any(state.nodes[seat].generation == 0 for seat in plan.seats)
        state.way = f"{plan.rung}, on a new node" if new else plan.rung
        self._started = decide(
            state,
            StartGeneration,
            plan.reason,
            seats=plan.seats,
            dismiss=plan.dismiss,
            restore=plan.restore,
            buddies=plan.buddies,
        )
        decisions: list[Decision] = [self._started]
        decisions += [
            decide(state, FenceNode, f"{node.id} has no seat", node=node.id)
            for _, node in sorted(state.nodes.items())
            if node.id not in plan.seats and node.generation > 0 and node.connected
        ]
        return decisions

    def _write_off(self, plan: Restart, restored: Step) -> None:
        """Enter what the restart costs: steps that will be computed again are lost work."""
        state = self.state
        for incident in (i for i in state.incidents if i.open):
            if incident.decided_at is None:
                incident.lost_steps = max(state.reached_step - restored, 0)
                incident.decided_at = state.now
            incident.rung, incident.reason = plan.rung, plan.reason
            incident.restored_step = restored
            incident.restarted_as = state.generation
            incident.restored_from = _tiers(plan)
            incident.timeline.append(Note(at=state.now, text=f"decided: {plan.reason}"))
        while state.step_log and state.step_log[-1][0] > restored:
            state.step_log.pop()
        since = state.step_log[-1][1] if state.step_log else Seconds(0.0)
        incident_id = state.incident.id if state.incident else None
        if state.best_step > 0:
            state.ledger.relabel(since, state.now, Bucket.LOST_WORK, incident_id)

    # Saving and finishing -----------------------------------------------------------------------

    def _advance(self) -> None:
        """Follow the marks: the least advanced node of the world says where the run is."""
        state = self.state
        if state.wanting or not state.seats:
            return
        mark = facts.world_mark(state)
        phase = PHASE_OF_MARK[mark]
        order = list(PHASE_OF_MARK)
        if state.phase in order and order.index(phase) > order.index(state.phase):
            whole = True
            for passed in order[order.index(state.phase) + 1 : order.index(phase) + 1]:
                if not (passed is RunPhase.TRAINING and mark == _MARK_FINISHED):
                    self._enter(passed, whole=whole)
                    whole = False  # of one that is passed over, nobody saw how long it took
        if mark >= _MARK_STEPPED:
            for incident in (i for i in state.incidents if i.open):
                incident.resumed_at = state.now
                cost = state.now - incident.since
                incident.timeline.append(
                    Note(at=state.now, text=f"training again, {cost:.2f} s after it began")
                )

    def _complete(self) -> bool:
        """Whether every rank is done and what they came to is durable, whoever was lost since."""
        last = Step(self.state.run.spec.trainer.steps)
        return len(self.state.lanes) == self.state.run.world_size and self.state.committed(last)

    def _completion(self) -> str:
        last = self.state.run.spec.trainer.steps
        return f"all {last} steps are done and step {last} is committed"

    def _concluding(self) -> bool:
        """Whether nothing is missing but the answer to the last commit, and that may still come.

        Nodes that are lost meanwhile are not needed any more.
        """
        state = self.state
        last = Step(state.run.spec.trainer.steps)
        patient = state.now - state.phase_since <= state.timeouts.save_s
        return state.phase is RunPhase.FINISHING and last in state.committing and patient

    def _finish(self) -> list[Decision]:
        state = self.state
        last = Step(state.run.spec.trainer.steps)
        spent_s = state.now - state.phase_since
        limit_s = state.timeouts.save_s
        if last in state.committing:
            # Its shards are there already; what is left is one small record.
            limit_s *= 2
            why = "its commit was ordered and has no answer"
        else:
            failed = [reason for _, step, reason in state.save_failures if step == last]
            why = failed[-1] if failed else "no node has said that it wrote its part"
        if spent_s <= limit_s:
            return []
        return self._end(
            "Failed",
            f"all {last} steps are done, but their checkpoint is not durable after "
            f"{limit_s:.0f} s: {why}",
        )

    def _end(self, end: str, reason: str) -> list[Decision]:
        state = self.state
        state.end_state, state.end_reason = end, reason
        final = {"Succeeded": RunPhase.SUCCEEDED, "Failed": RunPhase.FAILED}
        for incident in (i for i in state.incidents if i.open):
            if incident.decided_at is None:
                incident.decided_at = state.now
            incident.rung = incident.rung or "stop"
            incident.reason = reason
            incident.timeline.append(Note(at=state.now, text=f"stopped: {reason}"))
        self._enter(final.get(end, RunPhase.STOPPED))
        return [decide(state, EndRun, reason, state=end)]

    # Small things -------------------------------------------------------------------------------

    def _enter(self, phase: RunPhase, *, whole: bool = False) -> None:
        """Go on to a phase; say whether the one before came to its end."""
        state = self.state
        patience.learn(state, whole=whole)
        state.phase = require(state.phase, phase)
        state.phase_since, state.unseen_s = state.now, 0.0

    def _note(self, text: str) -> None:
        if self.state.incident is not None:
            self.state.incident.timeline.append(Note(at=self.state.now, text=text))


_SEVERITY = {"hang": 1, "crash": 2, "exception": 2, "node-silent": 3, "node-lost": 4}
"""Which kind names an incident when several findings belong to it: the one that explains more."""


def _mark(finding: Finding) -> _Mark:
    """Return what makes two findings of one incident the same."""
    return (finding.kind, finding.ranks, finding.nodes, finding.signature)


def _ancestors(state: RunState, plan: Restart) -> tuple[Ancestor, ...]:
    """Return whom the generation continues that comes after the present one."""
    restore = plan.restore
    if restore is None:
        return continued(state.ancestors, state.generation, None, None)
    epoch = next((c.epoch for c in state.commits if c.key == restore.commit), None)
    return continued(state.ancestors, state.generation, restore.step, epoch)


def _tiers(plan: Restart) -> str:
    if plan.restore is None:
        return "seed"
    own = sum(source == seat for source, seat in zip(plan.restore.sources, plan.seats, strict=True))
    durable = sum(source == "" for source in plan.restore.sources)
    buddies = len(plan.seats) - own - durable
    tiers = (("own memory", own), ("buddy's memory", buddies), ("durable tier", durable))
    return ", ".join(f"{name} ({count} ranks)" for name, count in tiers if count)
