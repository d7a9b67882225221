"""The controller: the one pure object that decides.

`handle(event)` is the only thing that changes the state, and it returns what is to be done. It
never asks for the time, for chance or for I/O; the same events give the same decisions, byte for
byte. It runs in five strokes: account for the time that passed, apply the fact, ask the
detectors, ask the policies if a generation is wanted, and ask to be woken.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core import (
    course,
    devices,
    drains,
    durable,
    facts,
    inspection,
    patience,
    saving,
    slowness,
    vouching,
)
from orchestrator.core.casebook import UNBROKEN, Casebook
from orchestrator.core.decisions import (
    AnnounceRendezvous,
    CarryOutFault,
    CatchUp,
    Decision,
    DisconnectNode,
    FenceNode,
)
from orchestrator.core.events import (
    ControllerStarted,
    DrainRequested,
    Event,
    FaultInjected,
    Reported,
    StopRequested,
    Telemetry,
    Tick,
)
from orchestrator.core.pacing import Pacing
from orchestrator.core.phases import BUCKET_OF, Bucket, RunPhase
from orchestrator.core.plans import Detector, Pacer, Policy
from orchestrator.core.records import Budget
from orchestrator.core.recovery import Recovery
from orchestrator.core.state import RunState, decide
from orchestrator.protocol.ids import NodeId, Seconds
from orchestrator.protocol.messages import Joined, RendezvousOffered
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import Timeouts

BLIND_BEATS = 3
"""A gap of this many beats between two events means that nobody was looking, not that all hung."""


class Controller:
    """Decides for one run.

    Its parts keep the incidents (`casebook`), bring the run back (`recovery`), lead it from phase
    to phase (`course`), and have it save as often as is best (`pacing`). What each fact changes is
    in `facts`; of what is in memory, in `copies`, and of what is durable, in `durable`.
    """

    def __init__(
        self,
        run: TrainingRun,
        timeouts: Timeouts,
        detectors: Sequence[Detector],
        policies: Sequence[Policy],
        pacer: Pacer | None = None,
    ) -> None:
        self.fixed: dict[str, object] = {"run": run, "timeouts": timeouts, "pacer": pacer}
        """What it is made with and never changes, by name; of a snapshot it is no part."""
        self.fixed |= {f"policy {n}": policy for n, policy in enumerate(policies)}
        recovery = run.spec.recovery
        self.state = RunState(run=run, timeouts=timeouts)
        self.state.budgets = {
            "hardware": Budget(recovery.hardware_budget),
            "software": Budget(recovery.software_budget),
            "preemption": Budget(recovery.preemption_budget),
        }
        self._casebook = Casebook(self.state, detectors)
        self._recovery = Recovery(self.state, policies)
        self._pacing = Pacing(self.state, pacer)
        self._heard_before = Seconds(0.0)
        """When the event before the present one was."""

    @property
    def disabled(self) -> dict[str, str]:
        """Detectors that raised and were switched off, with what they raised."""
        return self._casebook.disabled

    def handle(self, event: Event) -> list[Decision]:
        """Take in one event; return what is to be done about it, in order."""
        state = self.state
        if state.phase.final:
            return []
        self._account(event)
        decisions: list[Decision] = []
        facts.apply(state, event)
        durable.give_up_search(state)
        decisions += self._answer(event)
        self._casebook.look(event)
        decisions += devices.look(state, event)
        decisions += inspection.look(state)
        decisions += slowness.look(state)
        decisions += self._hang_up(event)
        decisions += saving.save(state)
        decisions += vouching.grade(state)
        decisions += self._pacing.look()
        course.advance(state)
        if isinstance(event, StopRequested):
            decisions += course.end(state, "Stopped", f"stopped by {event.by}")
        elif course.complete(state):
            decisions += course.succeed(state)
        elif state.wanting and not course.concluding(state):
            decisions += self._recovery.recover()
        elif state.phase is RunPhase.FINISHING:
            decisions += course.finish(state)
        return decisions

    # Time -----------------------------------------------------------------------------------

    def _account(self, event: Event) -> None:
        """Charge the time since the last event, and forgive the ranks for what nobody saw."""
        state = self.state
        # A world's clock does not run backwards, but two of its threads may stamp out of order.
        at = Seconds(max(event.at, state.now))
        bucket = BUCKET_OF[state.phase]
        incident = state.incident.id if state.incident else None
        if state.best_step == 0 and all(i.kind in UNBROKEN for i in state.incidents):
            bucket = Bucket.STARTUP
        if bucket is Bucket.EFFECTIVE and state.short:
            state.ledger.charge(at, bucket, state.shrunk_by, state.run.speed(state.replicas))
        else:
            state.ledger.charge(at, bucket, incident)
        gap = at - state.now
        self._heard_before, state.now = state.now, at
        watched_s = event.watched_s if isinstance(event, Telemetry | Tick) else 0.0
        if gap - watched_s > BLIND_BEATS * state.timeouts.beat_s or isinstance(
            event, ControllerStarted
        ):
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
            case DrainRequested():
                decisions += drains.wake(state)
            case ControllerStarted(incarnation=incarnation) if incarnation > 1:
                decisions += self._take_over(incarnation)
            case _:
                pass
        return decisions

    def _hang_up(self, event: Event) -> list[Decision]:
        """Have nodes call again that are not heard on the connection they have."""
        if not isinstance(event, Telemetry | Tick):
            return []  # of no other event the controller learns that time has passed in silence
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
        if behind and self._recovery.started is not None:
            if node in state.seated and not state.wanting and not state.nodes[node].lost:
                words = f"{node} comes from generation {joined.generation}, and has a seat"
                decisions.append(CatchUp(generation=state.generation, node=node, reason=words))
            else:
                words = f"{node} comes from generation {joined.generation} and has no seat"
                decisions.append(
                    FenceNode(
                        generation=state.generation,
                        node=node,
                        reason=f"{words} in {state.generation}",
                    )
                )
        if joined.generation == state.generation:
            decisions += self._pacing.repeat(node)
        if joined.generation == state.generation and joined.offered and not state.offered:
            state.offered = joined.offered
        if node in state.seated and state.offered:
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
        self._casebook.note_restart(incarnation, since=self._heard_before)
        decisions = saving.commit_again(state) + saving.judge_again(state)
        # Not by the phase: nodes that are not back yet may have moved it on.
        if state.asked_at is not None:
            words = "asked again by the next controller"
            decisions.append(self._recovery.search(words, graded=vouching.asked(state)))
        return decisions + drains.wake(state)
