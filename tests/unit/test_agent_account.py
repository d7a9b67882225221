"""What an agent says of its generation, and says again: no process, no clock."""

import msgspec

from orchestrator.agent.account import REPORTS_MAX, Account
from orchestrator.agent.impressions import Written
from orchestrator.agent.owed import STEPS_MAX, Owed
from orchestrator.protocol.digests import KINDS, Taken
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import (
    MARKS,
    Begin,
    FaultDue,
    Holding,
    Impression,
    NodeUnusable,
    RankExited,
    RanksFinished,
    RanksTroubled,
    Reached,
    Receipt,
    ShardsHeld,
    StepReport,
    WriteFailed,
)

TWO = (Rank(2), Rank(3))
G4 = Generation(4)


def account(generation: Generation = G4) -> Account:
    account = Account()
    account.begin(generation, TWO)
    return account


def report(step: int) -> StepReport:
    return StepReport(Step(step), 1.0 / step, 1.0, 8, 0.1)


def exit_of(rank: int, pid: int) -> RankExited:
    return RankExited(generation=G4, rank=Rank(rank), pid=pid, code=-9, phase=6, step=Step(1))


def test_the_least_advanced_rank_counts_and_each_mark_is_said_once() -> None:
    node = account()
    node.advance(MARKS.index("seated"))

    assert node.rank_reached(TWO[0], "formed") is None
    assert node.rank_reached(TWO[0], "restored") is None
    assert node.rank_reached(TWO[1], "restored") == Reached(
        generation=G4, mark=MARKS.index("restored")
    )
    assert node.rank_reached(TWO[1], "formed") is None


def test_marks_of_strangers_and_marks_that_are_none_are_ignored() -> None:
    node = account()

    for rank, mark in ((Rank(0), "stepped"), (TWO[0], "left"), (TWO[0], "seated"), (TWO[1], "x")):
        assert node.rank_reached(rank, mark) is None
    assert node.mark == 0


def test_a_node_is_done_when_all_its_ranks_are_and_then_only_once() -> None:
    node = account()

    assert node.rank_finished(TWO[1], Step(9), (3, 3)) is None
    assert node.rank_finished(TWO[0], Step(9), (2, 2)) == RanksFinished(
        generation=G4, step=Step(9), ranks=TWO, lanes=((2, 2), (3, 3))
    )
    assert node.rank_finished(TWO[0], Step(9), (2, 2)) is None
    assert node.rank_finished(Rank(0), Step(9), (0, 0)) is None


def test_a_rank_that_is_done_has_reached_every_mark_whatever_it_said_before() -> None:
    node = account()
    assert node.rank_reached(TWO[0], "stepped") is None

    fact = node.rank_finished(TWO[1], Step(9), (3, 3))

    assert fact == Reached(generation=G4, mark=MARKS.index("stepped"))
    assert node.mark == MARKS.index("stepped")


def test_facts_are_said_again_until_their_generation_is_over() -> None:
    node = account()
    exits = [exit_of(2, 10), exit_of(3, 11)]
    for fact in (*exits, exits[0], RanksTroubled(generation=G4, ranks=(TWO[0],), message="x")):
        node.keep(fact)
    # What a snapshot carries anyway is not said twice.
    node.keep(Reached(generation=G4, mark=1))
    node.keep(ShardsHeld(generation=G4, holdings=()))

    assert node.facts()[:2] == (exits[1], exits[0])
    assert len(node.facts()) == 3
    node.begin(Generation(5), TWO)
    assert node.facts() == ()


def test_facts_about_the_node_itself_outlive_the_generation() -> None:
    node = account()
    node.keep(NodeUnusable(reason="process 7 is still there"))
    node.keep(FaultDue(index=3))
    node.begin(Generation(5), TWO)

    assert len(node.facts()) == 2
    node.fault_answered(3)
    assert node.facts() == (NodeUnusable(reason="process 7 is still there"),)


def test_kept_facts_are_bounded() -> None:
    node = account()
    for step in range(10_000):
        node.keep(WriteFailed(generation=G4, step=Step(step), reason="full"))

    assert len(node.facts()) == 256
    assert node.facts()[-1] == WriteFailed(generation=G4, step=Step(9_999), reason="full")


def test_steps_are_sent_once_on_a_connection_and_again_on_the_next_if_not_known() -> None:
    node = account()
    node.record([report(1), report(2)])

    assert [r.step for r in node.unsent()] == [1, 2]
    assert node.unsent() == ()
    node.record([report(2), report(3)])
    assert [r.step for r in node.unsent()] == [3]
    node.reconnected(Step(1))
    fact = RanksTroubled(generation=G4, ranks=TWO, message="reset")
    assert node.owes_ahead_of(fact)
    assert [r.step for r in node.unsent()] == [2, 3]
    assert not node.owes_ahead_of(fact)


def test_digests_are_sent_before_a_node_says_that_it_is_done() -> None:
    """What the run ends with would else be compared with nothing: nobody listens any more."""
    node = account()
    taken = Taken(step=Step(9), period=1)
    node.record_digests(Rank(2), taken, (1,) * len(KINDS))
    done = RanksFinished(generation=G4, step=Step(8), ranks=TWO, lanes=((8, 1), (8, 2)))

    assert not node.owes_ahead_of(RanksTroubled(generation=G4, ranks=TWO, message="reset"))
    assert node.owes_ahead_of(done)
    assert [digests.taken for digests in node.unsent_digests()] == [taken]
    assert not node.owes_ahead_of(done)


def test_kept_steps_are_bounded_and_the_newest_stay() -> None:
    node = account()
    node.record(report(step) for step in range(1, REPORTS_MAX + 11))

    steps = [r.step for r in node.unsent()]
    assert (steps[0], steps[-1], len(steps)) == (11, REPORTS_MAX + 10, REPORTS_MAX)


def test_a_holding_is_vouched_for_once_the_controller_has_every_step_up_to_it() -> None:
    node = account()
    held = [Holding(TWO[0], Step(step)) for step in (5, 10, 15)]
    node.record(report(step) for step in range(6, 16))

    assert [h.step for h in node.vouched(held)] == [5]
    node.confirm(Step(10))
    assert [h.step for h in node.vouched(held)] == [5, 10]
    node.reconnected(Step(8))  # what was known stays known
    assert [h.step for h in node.vouched(held)] == [5, 10]
    node.confirm(Step(15))
    assert len(node.vouched(held)) == 3


def begin(*writers: int) -> Begin:
    ranks = tuple(Rank(rank) for rank in range(4))
    return Begin(
        order="b",
        generation=G4,
        world_size=4,
        ranks=ranks,
        seats=tuple(NodeId(n) for n in ("a", "a", "b", "b")),
        shard_of=ranks,
        writers=tuple(map(Rank, writers)),
    )


def written(shard: int) -> Written:
    seen = Impression(shard=shard, boxes="b", content=f"c{shard}", moving="", extra="e")
    return Written(Receipt(shard, 10, "d"), seen)


def test_a_node_owes_what_its_own_ranks_are_to_write() -> None:
    for writers, owing in (
        ((0, 1, 2, 3), {"a": {0, 1}, "b": {2, 3}}),
        ((0, 1), {"a": {0, 1}, "b": set()}),
        ((0, 2), {"a": {0}, "b": {2}}),
    ):
        for node, ranks in owing.items():
            owed = Owed()
            owed.begin(begin(*writers), NodeId(node))
            assert {rank for rank in range(4) if owed.owes(Rank(rank))} == ranks


def test_a_step_is_written_when_every_owing_rank_has() -> None:
    owed = Owed()
    owed.begin(begin(0, 1, 2, 3), NodeId("b"))

    assert owed.written(Rank(3), Step(7), written(3), "m") is None
    assert owed.written(Rank(3), Step(8), written(3), "m") is None
    fact = owed.written(Rank(2), Step(7), written(2), "m")

    assert fact is not None
    assert (fact.step, [r.shard for r in fact.receipts]) == (7, [2, 3])
    assert msgspec.json.encode(fact)


def test_a_failed_step_is_told_once_and_steps_that_never_complete_are_forgotten() -> None:
    owed = Owed()
    owed.begin(begin(0, 1, 2, 3), NodeId("b"))

    assert owed.failed(Step(1))
    assert not owed.failed(Step(1))
    for step in range(2, STEPS_MAX + 10):
        owed.written(Rank(3), Step(step), written(3), "m")
    assert owed.written(Rank(2), Step(2), written(2), "m") is None
    assert owed.written(Rank(2), Step(STEPS_MAX + 9), written(2), "m") is not None
