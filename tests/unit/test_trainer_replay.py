"""A micro-batch that comes out otherwise on another rank says which rank is wrong."""

from collections.abc import Callable

import pytest
import torch

from orchestrator.protocol import runfile
from trainer.replay import (
    Mismatch,
    Pace,
    every,
    halves,
    joined,
    judge,
    known_good,
    mismatches,
    of_itself,
)
from trainer.shares import Place, Share, share_of

RIGHT = 7


def rounds(
    ranks: int, wrong: dict[int, int]
) -> tuple[list[tuple[int, int]], Callable[[int], list[int]]]:
    """Return what ranks say of their own and of the next one's micro-batch, all of them RIGHT."""
    digests = [wrong.get(rank, RIGHT) for rank in range(ranks)]
    return [(one, one) for one in digests], lambda _: digests


def test_ranks_that_agree_have_no_mismatch() -> None:
    assert mismatches([(1, 2), (2, 3), (3, 1)], 1) == []


def test_a_rank_that_is_always_wrong_shows_as_producer_and_as_replayer() -> None:
    rows, again = rounds(3, {1: 9})

    assert mismatches(rows, 1) == [Mismatch(1, 0), Mismatch(2, 1)]
    found = judge(rows, 1, again)
    assert (found.ranks, found.proven) == ((1,), True)
    assert "rank 1 has 0000000000000009 for rank 1's micro-batch, 2 of 3 ranks" in found.evidence


def test_a_rank_that_was_wrong_once_is_named_by_what_it_had_said() -> None:
    rows, again = rounds(4, {})
    rows[2] = (9, RIGHT)

    assert judge(rows, 1, again).ranks == (2,)
    rows[2] = (RIGHT, 9)
    assert judge(rows, 1, again).ranks == (2,)


def test_replays_mean_nothing_once_most_ranks_differ_from_themselves() -> None:
    assert of_itself([(1, 1), (2, 2), (3, 3)]) == ""
    assert of_itself([(1, 1), (2, 9), (3, 3)]) == "", "a device that errs at times is to be named"
    assert of_itself([(1, 9), (2, 9), (3, 3)]).startswith("2 of 3 ranks get another gradient")


def test_of_two_ranks_that_differ_nobody_is_named() -> None:
    rows, again = rounds(2, {1: 9})

    found = judge(rows, 1, again)

    assert (found.ranks, found.proven) == ((0, 1), False)
    assert "no majority" in found.evidence


def test_of_ranks_that_compute_together_the_group_is_named_unless_one_differs_alone() -> None:
    """Ranks 2 and 3 are a group of `tp`; each has another part, and so another digest."""
    right = [7, 8, 7, 8, 7, 8]
    rows = [(own, own) for own in right]
    rows[2], rows[3] = (91, 7), (92, 8)

    found = judge(rows, 2, lambda _: right, 2)
    assert (found.ranks, found.proven) == ((2, 3), True)
    assert found.evidence.endswith("ranks 2 to 3 compute together, and one may mislead the others")

    rows[2] = (7, 7)
    found = judge(rows, 2, lambda _: right, 2)
    assert (found.ranks, found.proven) == ((3,), True)
    assert "together" not in found.evidence


def test_of_two_groups_that_differ_nobody_is_named() -> None:
    rows = [(7, 7), (8, 8), (7, 7), (9, 8)]

    found = judge(rows, 2, lambda _: [7, 8, 7, 8], 2)

    assert (found.ranks, found.proven) == ((1, 3), False)


def test_digests_survive_the_way_through_floating_point() -> None:
    digests = [0, 1, -1, 1 << 62, -(1 << 63), 0x123456789ABCDEF]

    row = halves(torch.tensor(digests)).tolist()

    found = [joined(low, high) for low, high in zip(row[::2], row[1::2], strict=True)]
    assert found == [digest % (1 << 64) for digest in digests]


def shares(batch: int, replicas: int, shards: int) -> list[Share]:
    job = runfile.Trainer(global_batch=batch, micro_batch=1)
    return [
        share_of(job, Place(replica, replicas, shard, shards))
        for replica in range(replicas)
        for shard in range(shards)
    ]


def test_it_is_done_as_often_as_its_share_of_the_time_allows() -> None:
    one, sixteen = shares(1, 1, 1)[0], shares(16, 1, 1)[0]

    assert (every(0.01, one), every(0.01, sixteen), every(1.0, one)) == (100, 7, 1)


@pytest.mark.parametrize(("replicas", "shards"), [(7, 1), (3, 2)])
def test_ranks_with_uneven_shares_replay_in_the_same_steps(replicas: int, shards: int) -> None:
    """Who replays waits for all others; who does so in another step waits in vain."""
    uneven = shares(32, replicas, shards)

    assert len({len(share.micro_batches) for share in uneven}) == 2
    assert len({every(0.01, share) for share in uneven}) == 1


def test_nobody_vouches_for_steps_between_the_last_replay_and_what_was_restored() -> None:
    assert [known_good(step, 10) for step in (0, 9, 11, 15, 30)] == [0, 0, 0, 4, 19]
    assert known_good(15, 1) == 13


def test_replays_that_cost_more_than_their_share_come_more_rarely_within_bounds() -> None:
    (own,) = shares(16, 1, 1)
    pace = Pace(0.01, own)
    assert (pace.every, pace.longest) == (7, 28)

    for costs in [(0.09, 0.3), (0.12, 0.1), (0.0, 0.2), (0.11, 0.4)]:
        assert pace.every == 7, "what one replay cost says little"
        pace.paid(costs)

    # The least of each: 0.09, 0.10 and 0.11 steps; of who does not know nothing is learned.
    assert pace.every == 10
    for _ in range(3):
        pace.paid((0.9, 0.9))
    assert pace.every == 28
    for _ in range(3):
        pace.paid((0.001, 0.002))
    assert pace.every == 7, "nor more often than its passes alone would allow"
    always = Pace(1.0, own)
    for _ in range(3):
        always.paid((2.0, 2.0))
    assert always.every == 1, "that is what whoever asks for all the time wants"


def test_who_is_watched_is_looked_at_in_every_step_and_vouches_for_no_step_more() -> None:
    (own,) = shares(16, 1, 1)
    usual, watched = Pace(0.01, own), Pace(0.01, own, watched=True)
    for _ in range(3):
        watched.paid((0.9, 0.9))

    assert watched.every == 1
    assert watched.longest == usual.longest, "the generation before may have been another"
