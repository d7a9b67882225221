"""Digests of replicas are compared, and the majority says who is wrong."""

import numpy as np
import pytest

from orchestrator.detect.votes import (
    EVIDENCE_MAX,
    Votes,
    dissents,
    of_world,
    parting,
    parts_of_world,
    verdict,
)
from orchestrator.protocol.digests import Digests, Kind, Taken, column
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.layout import Layout
from orchestrator.worlds.ballots import PATIENCE, Ballots

LAYOUT = Layout(dp_replicate=3, dp_shard=2)
SEATS = tuple(NodeId(f"node-{rank // 2}") for rank in range(6))


def votes(*values: int) -> dict[Kind, Votes]:
    return {"weights": np.array(values, np.uint64)}


def rows(taken: Taken, *values: int, first: int = 0) -> Digests:
    ranks = tuple(Rank(first + place) for place in range(len(values)))
    return Digests(taken, ranks, (column(values), "", "", "", "", "", ""))


def test_replicas_that_agree_have_nothing_to_say() -> None:
    assert dissents(votes(1, 2, 1, 2, 1, 2), LAYOUT) == []
    assert of_world(votes(1, 2, 1, 2, 1, 2), LAYOUT) == f"{3:016x}"


def all_kinds(**changed: tuple[int, ...]) -> dict[Kind, Votes]:
    """Digests of three replicas of two shards: 5 and 2^64 - 3 of every kind, but for these."""
    usual = (5, 2**64 - 3) * 3
    kinds = ("weights", "exp_avg", "exp_avg_sq", "gradient")
    return {kind: np.array(changed.get(kind, usual), np.uint64) for kind in kinds}  # type: ignore[misc]


def test_what_differs_of_a_step_is_told_by_kind_and_by_shard_if_it_is_one_alone() -> None:
    right = parts_of_world(all_kinds(), LAYOUT)
    one = all_kinds(exp_avg=(5, 7) * 3, gradient=(6, 7) * 3)

    assert parting(right, right, LAYOUT) == {}
    assert parting(right, parts_of_world(one, LAYOUT), LAYOUT) == {"exp_avg": (1,), "gradient": ()}
    swapped = parts_of_world(all_kinds(weights=(2**64 - 3, 5) * 3), LAYOUT)
    assert parting(swapped, right, LAYOUT) == {"weights": ()}


def test_what_was_not_taken_or_is_not_known_of_all_shards_does_not_differ() -> None:
    right = parts_of_world(all_kinds(), LAYOUT)
    without = all_kinds()
    del without["gradient"]

    assert parting(right, parts_of_world(without, LAYOUT), LAYOUT) == {}
    assert parts_of_world(all_kinds(weights=(5, 0) * 3), LAYOUT) == ""


def test_two_of_three_name_the_third_with_its_node_and_what_each_had() -> None:
    (found,) = dissents(votes(1, 2, 1, 7, 1, 2), LAYOUT)

    fact = verdict([found], Taken(step=Step(9)), Generation(4), SEATS)

    assert (found.kind, found.shard, found.outvoted) == ("weights", 1, (3,))
    assert (fact.nodes, fact.ranks, fact.proven) == ((NodeId("node-1"),), (Rank(3),), True)
    assert (fact.step, fact.since, fact.generation) == (8, 7, 4)
    assert fact.evidence == (
        "before step 9 moved the weights, weights of shard 1 had 2 digests: "
        "0000000000000002 by ranks 1, 5, 0000000000000007 by rank 3"
    )


@pytest.mark.parametrize("values", [(1, 2), (1, 2, 3)])
def test_without_a_majority_everybody_is_suspected_and_nobody_proven_guilty(
    values: tuple[int, ...],
) -> None:
    layout = Layout(dp_replicate=len(values))
    seats = tuple(NodeId(f"node-{rank}") for rank in range(len(values)))

    fact = verdict(dissents(votes(*values), layout), Taken(step=Step(1)), Generation(1), seats)

    assert fact.nodes == seats
    assert not fact.proven
    assert fact.since == 0
    assert "nobody can say who is right" in fact.evidence


def test_of_many_digests_evidence_lists_a_few() -> None:
    layout = Layout(dp_replicate=500)
    seats = tuple(NodeId(f"node-{rank}") for rank in range(500))

    fact = verdict(
        dissents(votes(*range(1, 501)), layout), Taken(step=Step(9)), Generation(1), seats
    )

    assert "had 500 digests: 0000000000000001 by rank 0, " in fact.evidence
    assert "by rank 3, and 496 more" in fact.evidence
    assert len(fact.evidence) < EVIDENCE_MAX


def test_a_rank_that_said_nothing_has_no_vote() -> None:
    (found,) = dissents(votes(1, 2, 1, 2, 9, 0), LAYOUT)

    assert found.outvoted == (4,)
    assert dissents(votes(1, 2, 1, 2, 0, 0), LAYOUT) == []


def test_many_nodes_that_are_outvoted_at_once_speak_against_the_digests() -> None:
    layout = Layout(dp_replicate=5)
    seats = tuple(NodeId(f"node-{rank}") for rank in range(5))

    fact = verdict(
        dissents(votes(1, 1, 1, 8, 9), layout), Taken(step=Step(5)), Generation(1), seats
    )

    assert fact.nodes == (NodeId("node-3"), NodeId("node-4"))
    assert not fact.proven
    assert "2 nodes were outvoted at once" in fact.evidence


def test_what_is_looked_at_every_third_step_is_known_to_be_good_before_that_only() -> None:
    found = dissents(votes(1, 2, 1, 7, 1, 2), LAYOUT)

    assert verdict(found, Taken(step=Step(9), period=3), Generation(1), SEATS).since == 5


def test_a_gradient_is_wrong_since_its_own_step() -> None:
    found = dissents({"gradient": votes(1, 2, 1, 7, 1, 2)["weights"]}, LAYOUT)

    fact = verdict(found, Taken(step=Step(9), period=3), Generation(1), SEATS)

    assert (fact.step, fact.since) == (8, 8)


def test_a_step_is_compared_once_all_ranks_have_said_what_they_had() -> None:
    ballots, taken = Ballots(), Taken(step=Step(3))
    ballots.begin(Generation(1), LAYOUT, SEATS)

    ballots.take([rows(taken, 1, 2, 1)])
    assert ballots.count()[:2] == ((), ())
    ballots.take([rows(taken, 2, 1, 2, first=3)])

    assert ballots.count()[:2] == (((3, f"{3:016x}"),), ())
    assert ballots.count()[:2] == ((), ())


def test_a_replay_counts_once_every_rank_has_said_that_its_own_came_out_the_same() -> None:
    ballots = Ballots()
    ballots.begin(Generation(1), LAYOUT, SEATS)
    passed = Taken(step=Step(7), shift=2)
    ballots.take([Digests(passed, tuple(map(Rank, range(5))), ("",) * 7)])
    ballots.take([Digests(Taken(step=Step(9)), tuple(map(Rank, range(6))), ("",) * 7)])
    assert ballots.count().replayed == 0

    ballots.take([Digests(passed, (Rank(5),), ("",) * 7)])

    assert ballots.count() == ((), (), (), 7)
    for _ in range(PATIENCE + 2):
        ballots.take([Digests(Taken(step=Step(11), shift=2), (Rank(0),), ("",) * 7)])
        assert ballots.count().replayed == 0


def test_a_divergence_is_told_once_though_every_later_step_shows_it() -> None:
    ballots = Ballots()
    ballots.begin(Generation(1), LAYOUT, SEATS)

    for step in (3, 4):
        ballots.take([rows(Taken(step=Step(step)), 1, 2, 1, 2, 1, 9)])
    states, diverged, *_ = ballots.count()

    assert states == ()
    assert [fact.step for fact in diverged] == [2]


def test_a_step_is_compared_without_who_said_nothing_of_it_for_some_beats() -> None:
    ballots, taken = Ballots(), Taken(step=Step(3))
    ballots.begin(Generation(1), LAYOUT, SEATS)

    ballots.take([rows(taken, 1, 2, 1, 2, 8)])
    for _ in range(PATIENCE):
        assert ballots.count(look=False)[:2] == ((), ())
        assert ballots.count()[:2] == ((), ())
    _, diverged, *_ = ballots.count()

    assert [fact.ranks for fact in diverged] == [(4,)]
    ballots.take([rows(taken, 7, first=5)])
    assert [ballots.count()[:2] for _ in range(PATIENCE + 2)] == [((), ())] * (PATIENCE + 2)


def test_however_many_steps_come_with_one_beat_all_are_compared_by_all_ranks() -> None:
    ballots = Ballots()
    ballots.begin(Generation(1), LAYOUT, SEATS)
    taken = [Taken(step=Step(step)) for step in range(200)]

    ballots.take([rows(one, 1, 2, 1, 2) for one in taken])
    assert ballots.count(look=False)[:2] == ((), ())
    ballots.take([rows(one, 1, 2, first=4) for one in taken])

    assert len(ballots.count().states) == 200


def test_no_more_steps_wait_than_there_is_memory_for() -> None:
    ballots = Ballots()
    ballots.begin(Generation(1), LAYOUT, SEATS)
    ballots.pending_max = 2

    ballots.take([rows(Taken(step=Step(step)), 1, 2, 1, 2, 8) for step in range(3)])
    _, diverged, *_ = ballots.count(look=False)

    assert [fact.since for fact in diverged] == [0]


def test_columns_that_do_not_fit_are_left_out_and_the_others_compared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ballots, taken = Ballots(), Taken(step=Step(3))
    ballots.begin(Generation(1), LAYOUT, SEATS)

    ballots.take([rows(taken, 1, 2, first=5)])
    ballots.take([Digests(taken, (Rank(0),), ("0" * 32, "", "", "", "", "", ""))])
    ballots.take([Digests(taken, (Rank(0),), (column((9,)), "no digest", "", "", "", "", ""))])
    ballots.take([rows(taken, 1, 2, 1, 2, 1, 2)])

    assert ballots.count().states == ((3, f"{3:016x}"),)
    assert "in a world of 6" in caplog.text
    assert "2 digests of 1 ranks" in caplog.text
    assert len(caplog.records) == 3
