"""What must hold at every event of every run, whatever breaks. Used by simulations and by tests."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.controller import Controller
from orchestrator.core.decisions import CommitCheckpoint, Decision, EndRun, StartGeneration
from orchestrator.core.events import CheckpointCommitted, Event
from orchestrator.core.state import RunState, violations
from orchestrator.policy.lemons import retired
from orchestrator.protocol.ids import Generation, NodeId, Step


class Invariants:
    """Safety: what may never be, seen from what the controller is told and what it orders."""

    def __init__(self) -> None:
        self._ordered: dict[Generation, StartGeneration] = {}
        self._best = Step(0)

    def __call__(self, controller: Controller, event: Event, decisions: Sequence[Decision]) -> None:
        """Raise AssertionError, saying what is not as it must be."""
        state = controller.state
        broken = violations(state)
        assert not broken, "; ".join(broken)
        assert not controller.disabled, f"detectors raised: {controller.disabled}"
        for decision in decisions:
            assert decision.reason, f"no reason for {type(decision).__name__}"
            match decision:
                case StartGeneration():
                    self._start(state, decision)
                case CommitCheckpoint(step=step, receipts=receipts):
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

    def _start(self, state: RunState, order: StartGeneration) -> None:
        known = self._ordered.get(order.generation)
        assert known is None or known == order, f"generation {order.generation} was ordered twice"
        if known is not None:
            return
        newest = max(self._ordered, default=Generation(0))
        assert order.generation > newest, f"generation {order.generation} after {newest}"
        self._ordered[order.generation] = order
        nodes = {seat: state.nodes[seat] for seat in order.seats}
        bad = sorted(seat for seat, node in nodes.items() if not node.usable or state.drained(seat))
        assert not bad, f"seats on nodes that can not be used: {', '.join(bad)}"
        before = self._ordered[newest].seats if newest in self._ordered else ()
        cordoned = sorted({*order.seats} & {*state.drains} - {*before})
        assert not cordoned, f"new seats on nodes that are cordoned: {', '.join(cordoned)}"
        left = {*state.spares()} - (lemons := retired(state))
        relied_on = sorted(({*order.seats} - {*before}) & lemons)
        assert not (left and relied_on), f"seats on {relied_on}, retired; {sorted(left)} are free"
        for node, buddy in order.buddies.items():
            assert node != buddy, f"{node} is its own buddy"
        if order.restore is not None and not order.restore.commit:
            for rank, source in enumerate(order.restore.sources):
                assert state.nodes[NodeId(source)].usable, f"rank {rank} restores from {source}"

    def _end(self, state: RunState, end: str) -> None:
        assert all(i.rung and i.reason for i in state.incidents), (
            "an incident ends without a reason"
        )
        if end == "Failed" and state.end_reason.startswith("needs "):
            nodes = state.nodes.values()
            usable = sum(node.usable and not state.drained(node.id) for node in nodes)
            assert usable < state.run.spec.nodes.count, (
                f"gave up with enough nodes: {state.end_reason}"
            )
        if end == "Succeeded":
            last = Step(state.run.spec.trainer.steps)
            assert state.committed(last), f"succeeded without a checkpoint of step {last}"
            missing = [s for s in range(1, last + 1) if s not in state.losses]
            assert not missing, f"no loss of steps {missing[:10]}"
            wrong = [s for s in range(1, last + 1) if state.losses[Step(s)] != 1.0 / s]
            assert not wrong, f"wrong loss of steps {wrong[:10]}"
