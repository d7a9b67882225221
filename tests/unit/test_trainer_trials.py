"""In which forms numbers come out wrong: each changes what it says, and nothing else."""

from typing import Any

import pytest
import torch

from orchestrator.protocol.ids import Rank
from orchestrator.protocol.injections import Injection, Span
from trainer.trials.forms import BIAS, HUGE, PERIOD, TILE, spoil, spoiled


def how(form: Any, **fields: Any) -> Injection:
    return Injection(site="weights", form=form, rank=Rank(0), step=1, **fields)


def struck(form: Any, **fields: Any) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Return which elements of a tensor have changed, and it before and after."""
    before = torch.linspace(0.5, 1.5, 1000).reshape(10, 100)
    after = before.clone()
    changed = spoil(after, how(form, **fields))
    at = torch.nonzero((before != after).view(-1)).view(-1).tolist()
    assert changed == bool(at)
    return at, before.view(-1), after.view(-1)


@pytest.mark.parametrize("bit", [0, 11, 23, 30, 31])
def test_a_flip_changes_one_bit_of_one_element(bit: int) -> None:
    at, before, after = struck("flip", element=0.25, bits=(bit,))

    assert at == [250]
    words = before.view(torch.int32) ^ after.view(torch.int32)
    assert words[250].item() & 0xFFFFFFFF == 1 << bit


def test_several_elements_are_others_for_another_seed_and_the_same_for_the_same_one() -> None:
    one, again, other = (
        struck("flip", bits=(1, 9), elements=10, seed=seed)[0] for seed in (1, 1, 2)
    )

    assert (one == again, one == other, len(one)) == (True, False, 10)


def test_a_tile_is_four_neighbours_on_a_period() -> None:
    at, _, _ = struck("tile", bits=(4,), elements=3)

    assert at == [PERIOD * n + k for n in range(3) for k in range(TILE)]


def test_numbers_are_replaced_swapped_scaled_or_lost() -> None:
    at, before, after = struck("huge", element=0.5)
    assert (at, after[500].item()) == ([500], pytest.approx(-HUGE * (1 + before[500].item())))
    assert struck("inf")[2][0].isinf()
    assert struck("nan")[2][0].isnan()
    at, before, after = struck("swap", element=0.1)
    assert at == [100, 101]
    assert after[100:102].tolist() == before[100:102].flip(0).tolist()
    at, before, after = struck("bias", elements=2)
    assert after[:2].tolist() == (before[:2] * BIAS).tolist()
    at, before, after = struck("stale", elements=5)
    assert after[:5].tolist() == before[5:10].tolist()
    assert struck("zeros", elements=5)[2][:6].tolist()[:5] == [0.0] * 5


def test_a_fault_of_a_range_leaves_all_other_numbers_alone() -> None:
    at, before, _ = struck("bias", elements=1000, within=Span(low=1.0, high=1.2))

    assert at == torch.nonzero((before >= 1.0) & (before < 1.2)).view(-1).tolist()
    assert struck("bias", within=Span(low=5.0, high=6.0))[0] == []


def test_what_changes_nothing_says_so_and_a_copy_leaves_the_tensor_as_it_was() -> None:
    zeros = torch.zeros(8)

    assert not spoil(zeros, how("zeros", elements=8))
    copied, changed = spoiled(zeros, how("stuck"))
    assert changed
    assert (zeros[0].item(), copied[0].item()) == (0.0, pytest.approx(0.7071))


def test_tokens_can_only_change_places() -> None:
    tokens = torch.tensor([[5, 6, 7]])

    assert spoil(tokens, how("swap"))
    assert tokens.tolist() == [[6, 5, 7]]
