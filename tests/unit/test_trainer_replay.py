"""A micro-batch that comes out otherwise on another rank says which rank is wrong."""

from collections.abc import Callable

import torch

from trainer.replay import Mismatch, every, halves, joined, judge, mismatches

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


def test_of_two_ranks_that_differ_nobody_is_named() -> None:
    rows, again = rounds(2, {1: 9})

    found = judge(rows, 1, again)

    assert (found.ranks, found.proven) == ((0, 1), False)
    assert "no majority" in found.evidence


def test_digests_survive_the_way_through_floating_point() -> None:
    digests = [0, 1, -1, 1 << 62, -(1 << 63), 0x123456789ABCDEF]

    row = halves(torch.tensor(digests)).tolist()

    found = [joined(low, high) for low, high in zip(row[::2], row[1::2], strict=True)]
    assert found == [digest % (1 << 64) for digest in digests]


def test_it_is_done_as_often_as_its_share_of_the_time_allows() -> None:
    assert (every(0.01, 1), every(0.01, 16), every(1.0, 1)) == (100, 7, 1)
