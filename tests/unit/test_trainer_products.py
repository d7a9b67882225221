"""What a gradient comes from is looked at on its way, and shows what is rounded away later."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.gradients import Probe
from trainer.guard import Guard
from trainer.model import Block, Llama, next_token_loss
from trainer.products import Products, reference

CONFIG = ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=48, vocab=64)
TOKENS = torch.arange(2 * 17).reshape(2, 17) * 7 % CONFIG.vocab
LINEAR_EACH = 7
Recompute = Literal["none", "selective", "full"]


def made(recompute: Recompute = "none") -> Llama:
    model = Llama(CONFIG)
    model.init_weights(3)
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.recompute = recompute
    return model


def computed(model: Llama, products: Products | None) -> list[Tensor]:
    """Return the loss of a micro-batch and its gradients."""
    model.zero_grad()
    if products is None:
        loss = next_token_loss(model(TOKENS[:, :-1]), TOKENS[:, 1:])
    else:
        with products.following(model):
            loss = next_token_loss(model(TOKENS[:, :-1]), TOKENS[:, 1:])
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return [loss.detach(), *(gradient.clone() for gradient in gradients)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_low_bit_that_neither_gradient_nor_loss_shows_is_seen_where_it_was_wrong() -> None:
    model, products = made(), Products(Guard("replays"))
    sound = computed(model, products)
    sums = products.sums()

    def wrong(_: nn.Module, __: object, out: Tensor) -> None:
        # Of the smallest number, a bit that adding it to what goes by it rounds away.
        flat = out.data.view(-1)
        flat.view(torch.int32)[flat.abs().argmin()] ^= 1

    model.get_submodule("layers.1.attention.wo").register_forward_hook(wrong)
    assert same(computed(model, products), sound)

    (differs,) = (products.sums() != sums).nonzero().flatten().tolist()
    assert products.what()[differs] == "what came out of layers.1.attention.wo, forward"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_looking_changes_no_bit_leaves_no_hook_and_looks_at_what_is_computed_again_once(
    recompute: Recompute,
) -> None:
    plain, products = Products(Guard("replays")), Products(Guard("replays"))
    expected = computed(made(), None)
    computed(made(), plain)
    model = made(recompute)

    assert same(computed(model, products), expected)
    assert torch.equal(products.sums(), plain.sums())
    assert len(products.what()) == len(products.sums()) == 4 * (2 * LINEAR_EACH + 1)
    assert products.sums().count_nonzero() == len(products.sums())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_any_bit_of_numbers_of_any_size_and_in_any_number_is_seen(
    dtype: torch.dtype, size: int
) -> None:
    layer = nn.Linear(size, size, bias=False, dtype=dtype)
    products = Products(Guard("replays"))
    x = torch.ones(1, size, dtype=dtype, requires_grad=True)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    found = []
    for bit in (None, *range(8 * dtype.itemsize - 1)):
        taken = x.detach().clone()
        if bit is not None:
            taken.view(words)[0, -1] ^= 1 << bit
        with products.following(layer):
            layer(taken.requires_grad_())
        found.append(int(products.sums()[0]))

    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("said", "accused", "expected"),
    [
        ("aab", [2], 0),
        # It is in gradients alone that rank 0 differs.
        ("aaa", [0], 1),
        ("baa", [0], 1),
        # Of two that differ nobody is known to be right.
        ("ab", [0, 1], 0),
    ],
)
def test_who_is_accused_is_compared_with_another_one_that_has_what_most_have(
    said: str, accused: list[int], expected: int
) -> None:
    assert reference([(float(ord(each)),) for each in said], accused) == expected


def test_what_is_compiled_is_not_looked_into() -> None:
    model = made()
    probe = Probe(Guard("replays"), compiled=True)

    with probe.following(model):
        assert not any(module._forward_hooks for module in model.modules())
    assert probe.products is None
