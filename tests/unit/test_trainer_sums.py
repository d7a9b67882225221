"""What rounding explains of the difference between what ranks put in and what came out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.gradients import PutIn
from trainer.sums import explained, runs, total


def added_up(parts: list[torch.Tensor], order: np.random.Generator) -> torch.Tensor:
    """Return the sum of parts in float32, in some order and in some tree."""
    left = list(parts)
    while len(left) > 1:
        one = left.pop(int(order.integers(len(left))))
        other = left.pop(int(order.integers(len(left))))
        left.append(one + other)
    return left[0]


def put_in_of(part: torch.Tensor) -> PutIn:
    return PutIn(total(part), float(part.norm()), abs(total(part)))


@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
def test_millions_of_numbers_of_one_sign_round_within_it_too(mean: float) -> None:
    parts = [
        torch.randn(1 << 21, generator=torch.Generator().manual_seed(r)) + mean for r in range(3)
    ]
    put_in = math.fsum(map(total, parts))

    off = total(parts[0] + parts[1] + parts[2]) - put_in

    assert abs(off) < explained([put_in_of(part) for part in parts]) / 4


@given(
    seed=st.integers(0, 1 << 32),
    ranks=st.integers(2, 16),
    count=st.integers(1, 1000),
    spread=st.floats(0.0, 4.0),
    shared=st.floats(-2.0, 2.0),
)
def test_sums_that_are_right_are_always_within_what_rounding_explains(
    seed: int, ranks: int, count: int, spread: float, shared: float
) -> None:
    chance = np.random.default_rng(seed)
    scale = np.exp(spread * chance.standard_normal(count))
    parts = [
        torch.from_numpy(((chance.standard_normal(count) + shared) * scale).astype(np.float32))
        for _ in range(ranks)
    ]
    bound = explained([put_in_of(part) for part in parts])

    put_in = math.fsum(map(total, parts))
    came_out = total(added_up(parts, chance))

    assert abs(came_out - put_in) <= bound


def test_one_number_that_is_off_by_a_thousandth_of_all_is_seen() -> None:
    parts = [torch.randn(100_000, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    bound = explained([put_in_of(part) for part in parts])
    came_out = torch.stack(parts).sum(0)
    off = 1e-3 * float(came_out.norm())

    came_out[77] += off

    assert abs(total(came_out) - math.fsum(map(total, parts))) > bound
    assert off < 1.0, "which is less than what a single number is, as a rule"


def test_what_lies_behind_each_other_in_memory_is_added_up_as_one() -> None:
    flat, apart = torch.arange(12.0), torch.full((3,), 7.0)
    part = [flat[:4].view(2, 2), flat[4:9], flat[9:], apart, flat[:3], flat[4:8].view(2, 2).t()]

    found = [each.tolist() for each in runs(part)]

    assert found == [flat.tolist(), apart.tolist(), [0.0, 1.0, 2.0], [4.0, 6.0, 5.0, 7.0]]
    assert list(runs([])) == []
