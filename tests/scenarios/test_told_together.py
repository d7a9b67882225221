"""What is told of many nodes at once changes exactly what it would if each of them had said it."""

import copy
from typing import Any

import msgspec
import pytest

from orchestrator.core.decisions import CommitCheckpoint, RetainMemory
from orchestrator.core.events import CopiesHeld, Event, Telemetry, Tick, Together
from orchestrator.core.report import report
from orchestrator.protocol.ids import Generation, NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import (
    MARKS,
    Holding,
    Prepared,
    RanksTroubled,
    Reached,
    Receipt,
    ShardsHeld,
    ShardsWritten,
    StepReport,
)
from orchestrator.protocol.phases import RankPhase


def twins(cluster: Any) -> tuple[Any, Any]:
    return copy.deepcopy(cluster), copy.deepcopy(cluster)


def same(one: Any, other: Any) -> None:
    assert one.state.phase == other.state.phase
    assert one.state.lowest_mark == other.state.lowest_mark
    assert one.state.behind == other.state.behind
    for step in {*one.state.holdings, *other.state.holdings}:
        mine, theirs = one.state.holdings.of(step), other.state.holdings.of(step)
        assert {n: mine.of(n) for n in one.state.nodes} == {
            n: theirs.of(n) for n in other.state.nodes
        }
    assert [i.reads for i in one.state.incidents] == [] == [i.reads for i in other.state.incidents]


def ordered(cluster: Any) -> None:
    cluster.tell(Tick(at=cluster.at()))
    for node in ("node-0", "node-1", "node-2"):
        cluster.join(node)
    cluster.found()


@pytest.mark.parametrize("named", [True, False], ids=["named", "everybody"])
def test_marks_that_are_reached_together(cluster: Any, *, named: bool) -> None:
    ordered(cluster)
    singly, together = twins(cluster)
    nodes = singly.state.world if named else ()
    for mark in MARKS[1:6]:
        fact = Reached(generation=Generation(1), mark=MARKS.index(mark))
        for node in singly.state.world:
            singly.say(node, fact)

        together.tell(Together(at=together.at(), nodes=nodes, fact=fact))

        same(singly, together)
    assert together.state.phase == "Training"


def test_a_mark_that_only_some_have_reached_holds_the_world_back(cluster: Any) -> None:
    ordered(cluster)
    fact = Reached(generation=Generation(1), mark=1)

    cluster.tell(Together(at=cluster.at(), nodes=(NodeId("node-0"),), fact=fact))

    assert cluster.state.behind == {"node-1"}
    assert cluster.state.phase == "Stopping"


def test_what_is_told_together_of_an_older_generation_is_dropped(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    cluster.exit(1)
    assert cluster.state.generation == 2

    cluster.tell(Together(at=cluster.at(), fact=Reached(generation=Generation(1), mark=6)))
    cluster.tell(CopiesHeld(at=cluster.at(), generation=Generation(1), step=Step(5), copied=True))

    assert cluster.state.lowest_mark == 0
    assert Step(5) not in cluster.state.holdings


def test_copies_that_are_held_by_all(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    singly, together = twins(cluster)
    every = tuple(Holding(Rank(rank), Step(10)) for rank in range(4))
    for node in singly.state.world:
        decisions = singly.say(node, ShardsHeld(generation=Generation(1), holdings=every))

    told = together.tell(
        CopiesHeld(at=together.at(), generation=Generation(1), step=Step(10), copied=True)
    )

    assert told == decisions
    assert [d.step for d in told if isinstance(d, RetainMemory)] == [10]
    same(singly, together)


def test_copies_that_no_buddy_has_are_safe_from_nothing(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)

    told = cluster.tell(
        CopiesHeld(at=cluster.at(), generation=Generation(1), step=Step(10), copied=False)
    )

    assert told == []
    assert cluster.state.holdings.of(Step(10)).count_R().tolist() == [1, 1, 1, 1]


def test_a_node_that_is_missing_from_it_holds_nothing_of_a_step(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)

    cluster.tell(
        CopiesHeld(
            at=cluster.at(), generation=Generation(1), step=Step(10), copied=True,
            missing=(NodeId("node-1"),),
        )
    )  # fmt: skip

    copies = cluster.state.holdings.of(Step(10))
    assert copies.of(NodeId("node-1")) == frozenset()
    assert copies.count_R().tolist() == [1, 1, 1, 1]


def test_what_did_not_reach_a_buddy_has_one_copy(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)

    told = cluster.tell(
        CopiesHeld(
            at=cluster.at(), generation=Generation(1), step=Step(10), copied=True,
            uncopied=(NodeId("node-1"),),
        )
    )  # fmt: skip

    copies = cluster.state.holdings.of(Step(10))
    assert told == []
    assert copies.count_R().tolist() == [2, 2, 1, 1]
    assert copies.holders(Rank(2)) == ["node-1"]


def test_state_that_many_nodes_have_prepared_together(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    cluster.exit(1)
    fact = Prepared(
        generation=Generation(2), step=Step(10), own=1, fetched=0, durable=1, reads=3, seconds=1.0
    )

    cluster.tell(Together(at=cluster.at(), fact=fact))

    assert cluster.state.incidents[-1].reads == {"2 nodes in generation 2": 6}


def columns(cluster: Any, **changes: Any) -> Telemetry:
    told: dict[str, Any] = {
        "at": cluster.at(),
        "generation": cluster.state.generation,
        "heard": tuple(sorted(cluster.state.nodes)),
        "phases": (int(RankPhase.FORWARD),),
        "steps": (7,),
        "progress": (1000,),
        "states": "S",
        "cpu_s": (1.0,),
        "stall_s": 0.0,
    }
    return Telemetry(**(told | changes))


def test_a_column_of_length_one_says_the_same_of_every_rank(cluster: Any) -> None:
    cluster.start()

    cluster.after(0.1).tell(columns(cluster, states="T"))

    fleet = cluster.state.fleet
    assert fleet.step_R.tolist() == [7] * 4
    assert fleet.states == "TTTT"
    assert fleet.moved_at_R.tolist() == [cluster.now] * 4


def test_time_that_somebody_watched_is_not_forgiven(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    blind, watched = twins(cluster)
    silent = ("node-0",)

    for each, watched_s in ((blind, 0.0), (watched, 9.9)):
        each.after(10).tell(columns(each, at=Seconds(each.now), heard=silent, watched_s=watched_s))

    assert blind.state.incidents == []
    assert [i.kind for i in watched.state.incidents] == ["node-silent"]


def test_steps_that_are_told_late_have_the_moments_at_which_they_were_done(cluster: Any) -> None:
    cluster.start()
    cluster.train(2)
    began = cluster.now
    reports = tuple(StepReport(Step(s), 2.0, 1.0, 100, 2.0) for s in (3, 4, 5))

    cluster.after(7.5).tell(columns(cluster, reports=reports, since_step_s=1.5, watched_s=7.0))

    done = [(step, round(at - began, 6)) for step, at in cluster.state.step_log][-3:]
    assert done == [(3, 2.0), (4, 4.0), (5, 6.0)]
    cluster.exit(1)
    lost = report(cluster.state).ledger
    assert sum(lost.values()) == pytest.approx(cluster.now)


def test_events_that_are_told_together_survive_the_journal() -> None:
    fact = RanksTroubled(generation=Generation(1), ranks=(), message="closed")
    told = [
        Together(at=Seconds(1.0), nodes=(NodeId("node-0"),), fact=fact),
        CopiesHeld(at=Seconds(1.0), generation=Generation(1), step=Step(1), copied=True),
        Tick(at=Seconds(1.0), watched_s=3.0),
    ]

    assert msgspec.json.decode(msgspec.json.encode(told), type=list[Event]) == told


def test_shards_that_were_written_by_all_are_committed_at_once(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)
    receipts = tuple(Receipt(shard=shard, size=1, index_digest="0" * 32) for shard in range(2))
    fact = ShardsWritten(generation=Generation(1), step=Step(20), receipts=receipts, model="m")

    told = cluster.tell(Together(at=cluster.at(), fact=fact))
    again = cluster.tell(Together(at=cluster.at(), fact=fact))

    assert [(d.step, d.receipts) for d in told if isinstance(d, CommitCheckpoint)] == [
        (20, receipts)
    ]
    assert again == []


def test_shards_of_which_one_is_missing_are_not_committed(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)
    receipts = tuple(Receipt(shard=shard, size=1, index_digest="0" * 32) for shard in (1, 1))
    fact = ShardsWritten(generation=Generation(1), step=Step(20), receipts=receipts, model="m")

    assert cluster.tell(Together(at=cluster.at(), fact=fact)) == []
