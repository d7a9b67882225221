"""Each invariant that is checked is broken once, to see that the checker says so."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from orchestrator.core import quarantine
from orchestrator.core.decisions import (
    CommitCheckpoint,
    Decision,
    EndRun,
    FenceNode,
    StartGeneration,
)
from orchestrator.core.events import CheckpointCommitted, Reported
from orchestrator.core.recovery import Recovery
from orchestrator.protocol.ids import Generation, NodeId, Step
from orchestrator.protocol.messages import Receipt, StateDiverged
from orchestrator.simulation import swarm
from orchestrator.simulation.checkers import Invariants
from orchestrator.simulation.swarm import Broken, attempt
from tests.conftest import Cluster

Break = Callable[[Cluster, list[Decision]], Sequence[Decision]]


@pytest.fixture
def swapped(cluster: Cluster) -> tuple[Cluster, Invariants, list[Decision]]:
    """A node was lost and a spare has its seats; what was decided about it was not checked yet."""
    invariants = Invariants()
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    for entry in cluster.entries:
        invariants(cluster.controller, entry.event, entry.decisions)
    return cluster, invariants, cluster.lose("node-1")


def with_order(decisions: list[Decision], **fields: Any) -> list[Decision]:
    """The same decisions, with an order to start that is not as it was."""
    return [
        msgspec.structs.replace(each, **fields) if isinstance(each, StartGeneration) else each
        for each in decisions
    ]


def order_of(decisions: list[Decision]) -> StartGeneration:
    (order,) = [each for each in decisions if isinstance(each, StartGeneration)]
    return order


def a_ledger_beside_the_clock(cluster: Cluster, decisions: list[Decision]) -> list[Decision]:
    cluster.state.ledger.end_us += 1
    return decisions


def an_older_generation(_: Cluster, decisions: list[Decision]) -> list[Decision]:
    return with_order(decisions, generation=Generation(0))


def a_generation_that_was_ordered_otherwise(
    _: Cluster, decisions: list[Decision]
) -> list[Decision]:
    return [*decisions, *with_order(decisions, dismiss=())]


def a_quarantined_seat(cluster: Cluster, decisions: list[Decision]) -> list[Decision]:
    quarantine.enter(cluster.state, [NodeId("node-2")], "proven")
    return decisions


def nobody_fenced(cluster: Cluster, decisions: list[Decision]) -> list[Decision]:
    cluster.state.nodes[NodeId("node-1")].connected = True
    return [each for each in decisions if not isinstance(each, FenceNode)]


def a_budget_overspent(cluster: Cluster, decisions: list[Decision]) -> list[Decision]:
    budget = cluster.state.budgets["hardware"]
    budget.spent = budget.limit + 1
    return decisions


def no_reason(_: Cluster, decisions: list[Decision]) -> list[Decision]:
    return with_order(decisions, reason="")


def an_end_without_a_reason(cluster: Cluster, _: list[Decision]) -> list[Decision]:
    cluster.state.incidents[-1].rung = ""
    return [EndRun(generation=cluster.state.generation, reason="over", state="Failed")]


def a_commit_of_the_generation_before(cluster: Cluster, _: list[Decision]) -> list[Decision]:
    receipts = tuple(Receipt(n, 1, "") for n in range(cluster.state.shard_count()))
    return [commit(Generation(cluster.state.generation - 1), receipts)]


def a_commit_without_a_shard(cluster: Cluster, _: list[Decision]) -> list[Decision]:
    return [commit(cluster.state.generation, (Receipt(0, 1, ""),))]


def commit(generation: Generation, receipts: tuple[Receipt, ...]) -> CommitCheckpoint:
    return CommitCheckpoint(
        generation=generation, reason="written", step=Step(10), receipts=receipts, model=""
    )


def a_source_that_is_lost(_: Cluster, decisions: list[Decision]) -> list[Decision]:
    restore = order_of(decisions).restore
    assert restore is not None
    return with_order(decisions, restore=msgspec.structs.replace(restore, sources=("node-1",) * 4))


def a_buddy_of_itself(_: Cluster, decisions: list[Decision]) -> list[Decision]:
    return with_order(decisions, buddies={NodeId("node-0"): NodeId("node-0")})


def a_success_without_a_checkpoint(cluster: Cluster, _: list[Decision]) -> list[Decision]:
    return [EndRun(generation=cluster.state.generation, reason="done", state="Succeeded")]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (a_ledger_beside_the_clock, "ledger is of "),
        (an_older_generation, "generation 0 after 1"),
        (a_generation_that_was_ordered_otherwise, "generation 2 was ordered twice"),
        (a_quarantined_seat, "seats on nodes that can not be used: node-2"),
        (nobody_fenced, "node-1 had a seat, has none now, and is not fenced"),
        (a_budget_overspent, "hardware budget: "),
        (no_reason, "no reason for StartGeneration"),
        (an_end_without_a_reason, "an incident ends without a reason"),
        (a_commit_of_the_generation_before, "commit of generation 1 in generation 2"),
        (a_commit_without_a_shard, "step 10: "),
        (a_source_that_is_lost, "rank 0 restores from node-1"),
        (a_buddy_of_itself, "node-0 is its own buddy"),
        (a_success_without_a_checkpoint, "succeeded without a checkpoint"),
    ],
)
def test_what_may_never_be_is_found(
    swapped: tuple[Cluster, Invariants, list[Decision]], broken: Break, words: str
) -> None:
    cluster, invariants, decisions = swapped
    event = cluster.entries[-1].event

    with pytest.raises(AssertionError, match=words):
        invariants(cluster.controller, event, broken(cluster, decisions))


def test_what_was_decided_is_sound(
    swapped: tuple[Cluster, Invariants, list[Decision]],
) -> None:
    cluster, invariants, decisions = swapped

    invariants(cluster.controller, cluster.entries[-1].event, decisions)


def test_a_commit_is_of_the_generation_that_there_is_when_it_is_ordered(
    swapped: tuple[Cluster, Invariants, list[Decision]],
) -> None:
    cluster, invariants, decisions = swapped
    event = cluster.entries[-1].event
    (late,) = a_commit_of_the_generation_before(cluster, decisions)

    invariants(cluster.controller, event, [late, *decisions])
    with pytest.raises(AssertionError, match="commit of generation 1 in generation 2"):
        invariants(cluster.controller, event, [*decisions, late])


def test_a_world_that_continues_what_came_after_a_corruption_is_found(
    swapped: tuple[Cluster, Invariants, list[Decision]],
) -> None:
    cluster, invariants, decisions = swapped
    diverged = StateDiverged(
        generation=Generation(1), step=Step(10), since=Step(5), evidence="digests differ"
    )
    told = Reported(at=cluster.at(), node=NodeId("node-0"), fact=diverged)
    restore = order_of(decisions).restore
    assert restore is not None

    invariants(cluster.controller, told, [])
    with pytest.raises(AssertionError, match="continues step 10 of 1; step 5 of 1 is the last"):
        invariants(cluster.controller, cluster.entries[-1].event, decisions)


def test_a_commit_of_a_generation_that_has_not_begun_is_found(cluster: Cluster) -> None:
    cluster.start()
    event = CheckpointCommitted(at=cluster.at(), step=Step(5), epoch=Generation(7), key="c")

    with pytest.raises(AssertionError, match="epoch 7 is ahead"):
        Invariants()(cluster.controller, event, [])


def test_a_world_with_fewer_replicas_than_it_could_have_is_found(
    swapped: tuple[Cluster, Invariants, list[Decision]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, invariants, decisions = swapped
    monkeypatch.setattr("orchestrator.policy.shrinking.fitting", lambda *_: 99)

    with pytest.raises(AssertionError, match="which are enough for 99"):
        invariants(cluster.controller, cluster.entries[-1].event, decisions)


def test_a_controller_that_never_brings_a_run_back_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start_only(self: Recovery) -> list[Decision]:
        return [] if self._state.seats else recover(self)

    recover = Recovery.recover
    monkeypatch.setattr(Recovery, "recover", start_only)
    monkeypatch.setattr(swarm, "PATIENCE", 0.2)

    found = [result for result in map(attempt, range(3, 9)) if isinstance(result, Broken)]

    assert any("s after the last fault, at step" in each.what for each in found), found
