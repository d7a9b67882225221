"""What must hold at every event of every run, whatever breaks. Used by simulations and by tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

from orchestrator import compose
from orchestrator.core.controller import Controller
from orchestrator.core.decisions import (
    AnnounceRendezvous,
    CatchUp,
    CommitCheckpoint,
    Decision,
    EndRun,
    FenceNode,
    StartGeneration,
    WakeAt,
)
from orchestrator.core.events import (
    CheckpointCommitted,
    Compared,
    CopiesHeld,
    Event,
    Reported,
    Telemetry,
    Tick,
    Together,
)
from orchestrator.core.invariants import violations
from orchestrator.core.journal import Entry
from orchestrator.core.ledger import micros
from orchestrator.core.state import RunState
from orchestrator.policy import shrinking
from orchestrator.policy.devices import on_probation
from orchestrator.policy.lemons import retired
from orchestrator.policy.suspicion import most
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Step
from orchestrator.protocol.messages import StateDiverged, StepReport
from orchestrator.protocol.runfile import TrainingRun
from storage.manifest import parse_commit_key


class Invariants:
    """Safety: what may never be, seen from what the controller is told and what it orders.

    Args:
        loss_of: the loss that each step must have had in a run that succeeds; default any.
    """

    def __init__(self, loss_of: Callable[[Step], float] | None = None) -> None:
        self._loss_of = loss_of
        self._ordered: dict[Generation, StartGeneration] = {}
        self._batches: dict[Step, int] = {}
        """Tokens of each step, the same with however many replicas."""
        self._good: list[tuple[Generation, Step]] = []
        """Of each corruption that was told: the newest generation by then, and the last good step.
        """

    def __call__(self, controller: Controller, event: Event, decisions: Sequence[Decision]) -> None:
        """Raise AssertionError, saying what is not as it must be."""
        state = controller.state
        broken = violations(state)
        assert not broken, "; ".join(broken)
        ledger_us, clock_us = state.ledger.end_us, micros(state.now)
        assert ledger_us == clock_us, f"ledger is of {ledger_us} us, the clock at {clock_us} us"
        assert not controller.disabled, f"detectors raised: {controller.disabled}"
        match event:
            case Telemetry(reports=reports):
                self._same_batches(reports)
            case (
                Reported(fact=StateDiverged(generation=generation, since=since))
                | Compared(fact=StateDiverged(generation=generation, since=since))
            ):
                newest = max(self._ordered, default=Generation(0))
                if generation == newest:
                    self._good.append((newest, since or Step(0)))
            case _:
                pass
        for place, decision in enumerate(decisions):
            assert decision.reason, f"no reason for {type(decision).__name__}"
            match decision:
                case StartGeneration():
                    self._start(state, decision, decisions)
                case CommitCheckpoint(step=step, receipts=receipts):
                    current = self._current(state, decisions[place + 1 :])
                    assert decision.generation == current, (
                        f"commit of generation {decision.generation} in generation {current}"
                    )
                    shards = sorted(receipt.shard for receipt in receipts)
                    assert shards == list(range(state.shard_count())), f"step {step}: {shards}"
                case EndRun(state=end):
                    self._end(state, end)
                case _:
                    pass
        if isinstance(event, CheckpointCommitted):
            assert event.epoch <= state.generation, f"epoch {event.epoch} is ahead"
        for name, budget in state.budgets.items():
            assert budget.spent <= budget.limit, f"{name} budget: {budget.spent} of {budget.limit}"

    def _current(self, state: RunState, later: Sequence[Decision]) -> Generation:
        """Return the generation that there is when an order is given which others follow."""
        # What is ordered in the breath before a new one is of the generation that ends with it.
        if any(isinstance(each, StartGeneration) for each in later):
            return max(self._ordered, default=Generation(0))
        return state.generation

    def _same_batches(self, reports: Iterable[StepReport]) -> None:
        """Raise AssertionError if a step is done again with another batch."""
        for report in reports:
            known = self._batches.setdefault(report.step, report.tokens)
            assert known == report.tokens, (
                f"step {report.step} had {known} tokens, and now {report.tokens}"
            )

    def _start(
        self, state: RunState, order: StartGeneration, decisions: Sequence[Decision]
    ) -> None:
        known = self._ordered.get(order.generation)
        assert known is None or known == order, f"generation {order.generation} was ordered twice"
        if known is not None:
            return
        newest = max(self._ordered, default=Generation(0))
        assert order.generation > newest, f"generation {order.generation} after {newest}"
        self._ordered[order.generation] = order
        nodes = {seat: state.nodes[seat] for seat in order.seats}
        kept_out = state.cordoned()
        bad = sorted(seat for seat, node in nodes.items() if not node.usable or seat in kept_out)
        assert not bad, f"seats on nodes that can not be used: {', '.join(bad)}"
        before = self._ordered[newest].seats if newest in self._ordered else ()
        # Or two generations of the run would train at once.
        told = {*order.seats} | {each.node for each in decisions if isinstance(each, FenceNode)}
        free = sorted(node for node in {*before} - told if state.nodes[node].connected)
        assert not free, f"{', '.join(free)} had a seat, has none now, and is not fenced"
        cordoned = sorted({*order.seats} & {*state.drains} - {*before})
        assert not cordoned, f"new seats on nodes that are cordoned: {', '.join(cordoned)}"
        probation = on_probation(state)
        left = {*state.spares()} - (lemons := retired(state)) - probation
        relied_on = sorted(({*order.seats} - {*before}) & (lemons | probation))
        assert not (left and relied_on), (
            f"seats on {relied_on}, retired or on probation; {sorted(left)} are free"
        )
        for node, buddy in order.buddies.items():
            assert node != buddy, f"{node} is its own buddy"
            assert buddy not in state.quarantined, f"{buddy} is quarantined, and a buddy"
        self._count(state, order, before)
        evicted = state.incident.evicted if state.incident is not None else ()
        assert len(evicted) <= most(state), f"{len(evicted)} nodes evicted for suspicion"
        if order.restore is not None:
            self._trust(order, newest)
        if order.restore is not None and not order.restore.commit:
            for rank, source in enumerate(order.restore.sources):
                assert state.nodes[NodeId(source)].serves, f"rank {rank} restores from {source}"

    def _count(self, state: RunState, order: StartGeneration, before: Sequence[NodeId]) -> None:
        """Raise AssertionError if a world has fewer replicas than it could have."""
        replicas = len(order.seats) // state.shard_count()
        nodes = len({*order.seats}) + len(state.spares())
        if len(order.seats) >= len(before):
            # Who may be at fault, and was swapped for a spare, does not come back at once to have
            # the run grow. No run shrinks for that.
            nodes -= len({*before} & {*state.spares()})
        fitting = shrinking.fitting(state, nodes)
        assert replicas >= shrinking.least(state), f"{replicas} replicas are too few"
        assert fitting <= replicas or shrinking.undone(state), (
            f"{replicas} replicas on {nodes} nodes, which are enough for {fitting}"
        )

    def _trust(self, order: StartGeneration, newest: Generation) -> None:
        """Raise AssertionError if what is restored came after a corruption that is known."""
        restore = order.restore
        assert restore is not None
        commit = parse_commit_key(restore.commit)
        epoch = newest if commit is None else Generation(commit[1])
        for until, good in self._good:
            assert epoch > until or restore.step <= good, (
                f"generation {order.generation} continues step {restore.step} of {epoch}; step "
                f"{good} of {until} is the last that is known to be good"
            )

    def _end(self, state: RunState, end: str) -> None:
        assert all(i.rung and i.reason for i in state.incidents), (
            "an incident ends without a reason"
        )
        if end == "Failed" and state.end_reason.startswith("needs "):
            nodes = state.nodes.values()
            kept_out = state.cordoned()
            usable = sum(node.usable and node.id not in kept_out for node in nodes)
            needed = shrinking.nodes_for(state.run, shrinking.least(state))
            assert usable < needed, f"gave up with enough nodes: {state.end_reason}"
        if end == "Succeeded":
            last = Step(state.run.spec.trainer.steps)
            assert state.committed(last), f"succeeded without a checkpoint of step {last}"
            told = range(state.untold_step + 1, last + 1)
            missing = [s for s in told if s not in state.losses]
            assert not missing, f"no loss of steps {missing[:10]}"
            steps = map(Step, told) if self._loss_of is not None else ()
            wrong = [s for s in steps if self._loss_of and state.losses[s] != self._loss_of(s)]
            assert not wrong, f"wrong loss of steps {wrong[:10]}"


class Liveness:
    """Once faults have stopped, a run has to come to rest: it is not begun again without end.

    Args:
        calm_at: when they have stopped.
        most: generations that may begin after that.
    """

    def __init__(self, calm_at: Seconds, most: int) -> None:
        self._calm_at, self._most = calm_at, most
        self._begun: set[Generation] = set()

    def __call__(self, controller: Controller, event: Event, decisions: Sequence[Decision]) -> None:
        """Raise AssertionError if there were too many."""
        del event
        state = controller.state
        if state.now > self._calm_at:
            starts = (each for each in decisions if isinstance(each, StartGeneration))
            self._begun |= {each.generation for each in starts}
        assert len(self._begun) <= self._most, (
            f"begun again {len(self._begun)}x since the last fault, and still "
            f"{state.phase} at step {state.reached_step}: {state.incidents[-1].reason}"
        )


class Redelivery:
    """What an agent says again, as it does when it reconnects, changes nothing.

    It is told to a copy of the controller, which is thrown away.

    Args:
        repeats: says of each report whether it is tried; a copy costs milliseconds.
    """

    def __init__(self, repeats: Callable[[], bool]) -> None:
        self._repeats = repeats

    def __call__(self, controller: Controller, event: Event, decisions: Sequence[Decision]) -> None:
        """Raise AssertionError, saying what a second delivery has changed."""
        if not isinstance(event, Reported | Together | CopiesHeld) or not self._repeats():
            return
        twin = copy.deepcopy(controller)
        # Some things come about with whatever event is next, or with a tick only, such as that
        # somebody is silent; the second delivery makes no difference to them.
        again = twin.handle(event) + twin.handle(Tick(at=event.at))
        other = copy.deepcopy(controller)
        anyway = other.handle(Tick(at=event.at))
        before, after = _essence(other.state), _essence(twin.state)
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"told twice, {type(event).__name__} changes {', '.join(changed)}"
        known = [*decisions, *anyway]
        new = [d for d in again if not isinstance(d, _REPEATABLE) and d not in known]
        assert not new, f"told twice, {type(event).__name__} leads to {new}"


_REPEATABLE = (CatchUp, AnnounceRendezvous, FenceNode, WakeAt)
"""Orders that a node which says again where it is may need again; `Invariants` compares them."""


def _essence(state: RunState) -> dict[str, object]:
    """Return what a recovery, or a result, may depend on."""
    return {
        "phase": state.phase,
        "generation": state.generation,
        "incidents": [(i.id, i.kind, i.rung, len(i.findings)) for i in state.incidents],
        "budgets": {name: budget.spent for name, budget in state.budgets.items()},
        "steps": (state.reached_step, state.best_step, state.retained),
        "commits": [(c.key, c.rejected) for c in state.commits],
        "committing": state.committing,
        "marks": (state.lowest_mark, state.behind),
        "copies": {step: state.holdings.of(step).count_R().tolist() for step in state.holdings},
        "condemned": (state.condemned_memory, state.struck, state.bad_copies, state.distrusted),
        "unfit": state.unfit,
        "trust": (state.onsets, state.quarantined, state.suspects),
        "devices": (state.devices, [*state.judging_devices], state.watched, state.retesting),
        "ledger": {str(name): us for name, us in state.ledger.totals().items()},
    }


def check(run: TrainingRun, entries: Iterable[Entry]) -> Controller:
    """Replay a journal, with every check at every event; return who decided.

    Raises:
        AssertionError: saying what is not as it must be, and at which event.
    """
    controller = compose.controller(run)
    checks = (Invariants(), Redelivery(lambda: True))
    for entry in entries:
        decisions = controller.handle(entry.event)
        try:
            assert tuple(decisions) == entry.decisions, "it is decided otherwise when replayed"
            for each in checks:
                each(controller, entry.event, decisions)
        except AssertionError as error:
            error.add_note(f"event {entry.seq}, at {entry.event.at:.3f} s: {entry.event}")
            raise
    return controller
