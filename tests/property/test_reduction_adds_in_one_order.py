"""Whoever owns which rounds, the same is added to the same."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.reduction import Node, Tree, _buckets, subtrees


@st.composite
def rounds_and_borders(draw: st.DrawFn) -> tuple[list[Tensor], list[int]]:
    """Rounds whose sum depends on the order, and where the stretches of replicas begin and end."""
    count = draw(st.integers(1, 40))
    inner = draw(st.sets(st.integers(1, count - 1), max_size=6)) if count > 1 else set()
    chance = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    spread = 10.0 ** torch.randint(-4, 5, (count, 3), generator=chance)
    rounds = list(torch.randn(count, 3, generator=chance) * spread)
    return rounds, [0, *sorted(inner), count]


def in_halves(rounds: list[Tensor], begin: int, level: int) -> Tensor:
    if level == 0:
        return rounds[begin]
    middle = begin + (1 << (level - 1))
    left = in_halves(rounds, begin, level - 1)
    return left + in_halves(rounds, middle, level - 1) if middle < len(rounds) else left


@given(rounds_and_borders())
def test_the_sum_is_that_of_halves_of_halves_wherever_replicas_end(
    drawn: tuple[list[Tensor], list[int]],
) -> None:
    rounds, borders = drawn
    whole = Tree()
    for begin, end in itertools.pairwise(borders):
        own = Tree()
        for at in range(begin, end):
            own.add(Node(0, at), [rounds[at].clone()])

        assert own.nodes == subtrees(range(begin, end))
        assert len(own.nodes) <= 2 * (end - begin).bit_length()
        for node, tensors in zip(own.nodes, own.sums, strict=True):
            whole.add(node, tensors)

    (total,) = whole.total()
    assert torch.equal(total, in_halves(rounds, 0, (len(rounds) - 1).bit_length()))
    assert whole.nodes == []


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 12), st.integers(1, 3))
def test_buckets_are_every_element_of_every_sum_once_and_as_many_as_fit(
    sizes: list[int], size: int, sums: int
) -> None:
    tensors = [[torch.full((n,), float(k)) for n in sizes] for k in range(sums)]

    buckets = list(_buckets(tensors, size))

    counts = [sum(piece.numel() for piece in bucket[0]) for bucket in buckets]
    assert counts[:-1] == [size] * (len(counts) - 1)
    assert sum(counts) == sum(sizes)
    for bucket in buckets:
        for k, pieces in enumerate(bucket):
            for piece in pieces:
                piece.add_(100 + k)  # a view: the sum itself changes
    assert all((t == 100 + 2 * k).all() for k, row in enumerate(tensors) for t in row)
