"""Brings a run back when a generation is wanted: does what the policies say, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq

import msgspec

from orchestrator.core import course, devices, facts, inspection, patience, quarantine
from orchestrator.core.decisions import (
    Decision,
    FenceNode,
    SearchCheckpoints,
    StartGeneration,
    WakeAt,
)
from orchestrator.core.fleet import Fleet
from orchestrator.core.incident import BUDGET_OF, Note
from orchestrator.core.lineage import continued
from orchestrator.core.paces import Paces
from orchestrator.core.phases import Bucket, RunPhase
from orchestrator.core.plans import (
    End,
    Pause,
    Plan,
    Policy,
    Quarantine,
    Restart,
    Search,
    WaitForNodes,
)
from orchestrator.core.records import Resize
from orchestrator.core.standing import Standing
from orchestrator.core.state import RunState, decide
from orchestrator.protocol.ids import Generation, Seconds, Step
from orchestrator.protocol.messages import Ancestor


class Recovery:
    """Recovers one run.

    Args:
        state: of the run.
        policies: asked in this order; the last one always has an answer.

    Attributes:
        started: the order that started the present generation; None before the first.
    """

    def __init__(self, state: RunState, policies: Sequence[Policy]) -> None:
        self._state = state
        self._policies = tuple(policies)
        self._waking: Seconds | None = None
        """For when it asked last to be woken, by what it waits for."""
        self.started: StartGeneration | None = None

    def recover(self) -> list[Decision]:
        """Do what the first policy says that has an answer."""
        for policy in self._policies:
            plan = policy(self._state)
            if plan is not None:
                return self._follow(plan)
        raise AssertionError("no policy answered; the last one must always")

    def _follow(self, plan: Plan) -> list[Decision]:
        state = self._state
        match plan:
            case End(state=end, reason=reason):
                return self._await_answers() or course.end(state, end, reason)
            case Pause(until=until, reason=reason):
                state.pause_until = until
                return self._wait(RunPhase.BACKING_OFF, until, reason)
            case WaitForNodes(until=until, reason=reason):
                return self._wait(RunPhase.GATHERING, until, reason)
            case Search():
                return self._look(plan)
            case Quarantine():
                return self._quarantine(plan)
            case Restart():
                return self._restart(plan)

    def _await_answers(self) -> list[Decision]:
        """Wait until it is known where ranks stood: the hang that ends a run is read most."""
        until = inspection.awaited(self._state)
        if until is None:
            return []
        self._waking = until
        reason = "where ranks stand is asked, and nobody can see it once the run has ended"
        return [decide(self._state, WakeAt, reason, at=until)]

    def _quarantine(self, plan: Quarantine) -> list[Decision]:
        """Take nodes out, and go on as if they had never been there."""
        state = self._state
        assert any(node not in state.quarantined for node in plan.nodes), "nobody was taken out"
        quarantine.enter(state, plan.nodes, plan.reason)
        if state.incident is not None:
            words = f"quarantined {', '.join(plan.nodes)}: {plan.reason}"
            state.incident.timeline.append(Note(at=state.now, text=words))
        return self.recover()

    def _wait(self, phase: RunPhase, until: Seconds, reason: str) -> list[Decision]:
        state = self._state
        if state.phase is not phase:
            course.enter(state, phase)
        elif self._waking is None or state.now < self._waking <= until:
            return []  # is asked again then, if not before, or gathers from the beginning on
        self._waking = until
        if state.incident is not None:
            state.incident.timeline.append(Note(at=state.now, text=reason))
        return [decide(state, WakeAt, reason, at=until)]

    def _look(self, plan: Search) -> list[Decision]:
        """Search when it is time to, unless an answer is still due."""
        state = self._state
        if state.phase is not RunPhase.SEARCHING:
            course.enter(state, RunPhase.SEARCHING)
        if state.asked_at is not None:
            return []
        if plan.at is None or state.now >= plan.at:
            return [self.search(plan.reason, graded=plan.graded)]
        if plan.at == self._waking:
            return []
        self._waking = plan.at
        return [decide(state, WakeAt, plan.reason, at=plan.at)]

    def search(self, reason: str, *, graded: bool = False) -> SearchCheckpoints:
        """Return the order to search the durable tier, from now on.

        Args:
            reason: why.
            graded: whether what is compute verified comes before what is newer.
        """
        self._state.asked_at = self._state.now
        self._state.searches += 1
        return decide(
            self._state,
            SearchCheckpoints,
            reason,
            number=self._state.searches,
            onsets=tuple(self._state.onsets),
            graded=graded or msgspec.UNSET,
        )

    def _restart(self, plan: Restart) -> list[Decision]:
        state = self._state
        # Advanced now, not when the new world reports: what is left of the old one is fenced
        # from this moment, however long it takes to die.
        # Above those of former lives, and above every epoch in the store: keys are taken also by
        # what was rejected, or never committed.
        seen = state.found.epoch_seen if state.found else Generation(0)
        newest = max([state.former_generation, seen, *(c.epoch for c in state.commits)])
        state.ancestors = _ancestors(state, plan)
        state.generation = Generation(max(state.generation, newest) + 1)
        restored = plan.restore.step if plan.restore else Step(0)
        state.from_seed = state.from_seed or plan.restore is None
        self._write_off(plan, restored)
        if state.diverged:
            state.sound_step = min(state.sound_step, restored)
        before, had_seats = state.replicas, frozenset(state.seated)
        facts.reset_for_generation(state, plan.seats, plan.buddies, plan.restore)
        self._resize(before, restored)
        state.cadence_begun = state.cadence
        state.fleet, state.paces = Fleet(len(state.seats), state.now), Paces(len(state.seats))
        state.wanting = False
        state.found = state.asked_at = None
        state.search_failure, state.search_failures = "", 0
        state.pause_until = None
        state.rungs[plan.rung] = state.rungs.get(plan.rung, 0) + 1
        if state.incident is not None and state.incident.cause in BUDGET_OF:
            state.budgets[BUDGET_OF[state.incident.cause]].spent += 1
            state.futile_restarts += 1
        course.enter(state, RunPhase.STOPPING)
        new = any(state.nodes[node].generation == 0 for node in state.seated)
        anew = plan.restore is not None and plan.restore.cut_anew != ""
        state.way = plan.rung + patience.CUT_ANEW * anew + patience.ON_A_NEW_NODE * new
        probation = devices.nodes_in(state, Standing.PROBATION)
        self.started = decide(
            state,
            StartGeneration,
            plan.reason,
            seats=plan.seats,
            dismiss=plan.dismiss,
            restore=plan.restore,
            buddies=plan.buddies,
            cadence=None if state.cadence == state.run.cadence else state.cadence,
            watched=tuple(sorted(probation.intersection(plan.seats))),
        )
        decisions: list[Decision] = [self.started]
        decisions += [
            decide(state, FenceNode, f"{node} has no seat", node=node)
            for node in sorted(state.nodes.keys() - state.seated.keys())
            # What had a seat may be about to begin the generation before, and not have said so.
            if (state.nodes[node].generation > 0 or node in had_seats)
            and state.nodes[node].connected
        ]
        return decisions

    def _resize(self, before: int, restored: Step) -> None:
        """Enter that the number of replicas is another than before, if it is."""
        state, after = self._state, self._state.replicas
        resized = before not in (0, after)
        if not state.run.same_bits and (resized or any(r.step > restored for r in state.resizes)):
            # Others made those steps: they come out differently, and nothing is wrong with that.
            state.losses = {step: loss for step, loss in state.losses.items() if step <= restored}
            state.digests = {step: text for step, text in state.digests.items() if step <= restored}
        if not resized:
            return
        incident = state.incident.id if state.incident else None
        state.resizes.append(Resize(state.now, incident, before, after, restored))
        # What was learned of steps holds for those of the new world, in proportion.
        (done, of), (done_now, of_now) = state.run.speed(before), state.run.speed(after)
        state.step_times.stretch(done * of_now / (of * done_now))

    def _write_off(self, plan: Restart, restored: Step) -> None:
        """Enter what the restart costs: steps that will be computed again are lost work."""
        state = self._state
        deep = plan.restore is None or bool(plan.restore.commit)
        state.experience.interrupted(state.open_incidents(), deep=deep)
        for incident in state.open_incidents():
            if incident.decided_at is None:
                incident.lost_steps = max(state.reached_step - restored, 0)
                incident.decided_at = state.now
            incident.rung, incident.reason = plan.rung, plan.reason
            incident.restored_step = restored
            incident.restarted_as = state.generation
            if incident is state.incident:
                incident.evicted += plan.evicted
            incident.quarantined = tuple(n for n in incident.nodes if n in state.quarantined)
            incident.restored_from = _tiers(plan)
            incident.timeline.append(Note(at=state.now, text=f"decided: {plan.reason}"))
        while state.step_log and state.step_log[-1][0] > restored:
            state.step_log.pop()
        since = state.step_log[-1][1] if state.step_log else Seconds(0.0)
        incident_id = state.incident.id if state.incident else None
        if state.best_step > 0:
            state.ledger.relabel(since, state.now, Bucket.LOST_WORK, incident_id)


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
    if plan.restore.sources == plan.seats and not plan.restore.staged_as:
        return f"own memory ({len(plan.seats)} ranks)"
    if plan.restore.commit:
        reading = plan.restore.sources.count("")
        fetching = len(plan.seats) - reading
        anew = ", cut anew" * bool(plan.restore.cut_anew)
        told = f"durable tier{anew} ({reading} ranks)"
        return told + f", and from those who read it there ({fetching} ranks)" * bool(fetching)
    own = sum(map(eq, plan.restore.sources, plan.seats))
    twins = 0
    if plan.restore.staged_as:
        there = zip(plan.restore.staged_as, plan.restore.sources, strict=True)
        moved = [rank for rank, (other, _) in enumerate(there) if rank != other]
        twins = len(moved)
        own -= sum(plan.restore.sources[rank] == plan.seats[rank] for rank in moved)
    tiers = (
        ("own memory", own),
        ("buddy's memory", len(plan.seats) - own - twins),
        ("another replica's copy", twins),
    )
    return ", ".join(f"{name} ({count} ranks)" for name, count in tiers if count)
