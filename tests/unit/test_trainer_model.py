import msgspec
import pytest
import torch

from orchestrator.worker import MisconfiguredError
from trainer.config import PRESETS, ModelConfig, RopeScaling, model_config
from trainer.embedding import Looked
from trainer.model import Llama, next_token_loss, rope_table, rotate

torch.set_num_threads(1)  # on a busy machine, two that spin took twenty seconds for one test
TINY = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab=64)


def tiny(seed: int = 0) -> Llama:
    model = Llama(TINY)
    model.init_weights(seed)
    return model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("8B", 8_030_261_248), ("70B", 70_553_706_496), ("405B", 405_853_388_800)],
)
def test_presets_have_exactly_the_published_number_of_parameters(
    name: str, parameters: int
) -> None:
    with torch.device("meta"):
        model = Llama(PRESETS[name])

    assert sum(p.numel() for p in model.parameters()) == parameters
    assert PRESETS[name].parameters == parameters


def test_the_closed_form_counts_what_the_debug_model_has() -> None:
    debug = PRESETS["debug"]
    assert sum(p.numel() for p in Llama(debug).parameters()) == debug.parameters


def test_a_token_of_one_document_does_not_move_the_logits_of_another() -> None:
    model = tiny()
    tokens = torch.arange(16)[None] % TINY.vocab
    changed = tokens.clone()
    changed[0, 3] = 50

    with torch.no_grad():
        before = model(tokens, [[0, 8, 16]])
        after = model(changed, [[0, 8, 16]])

    assert torch.equal(before[0, 8:], after[0, 8:])
    assert not torch.equal(before[0, 3:8], after[0, 3:8])
    assert torch.equal(before[0, :3], after[0, :3])


def test_rope_depends_on_distance_only() -> None:
    cos, sin = rope_table(32, 8, 500_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1))

    def score(at: int, distance: int) -> torch.Tensor:
        here = rotate(q, cos[at + distance : at + distance + 1], sin[at + distance :][:1])
        there = rotate(k, cos[at : at + 1], sin[at : at + 1])
        return (here * there).sum()

    torch.testing.assert_close(score(2, 5), score(20, 5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [2, 8, 10, 16, 32, 48, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_has_the_bits_of_products_and_sums_of_pairs(width: int, dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(width)
    x, towards = (torch.randn(2, 3, 9, width, generator=chance).to(dtype) for _ in range(2))
    x, towards = (t.transpose(1, 2).requires_grad_() for t in (x, towards))
    cos, sin = (table.unsqueeze(-2) for table in rope_table(9, width, 500_000.0))
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    expected = pairs.flatten(-2).type_as(x)

    turned = rotate(x, cos.squeeze(-2), sin.squeeze(-2))

    assert torch.equal(turned, expected)
    assert torch.equal(
        torch.autograd.grad(turned, x, towards)[0], torch.autograd.grad(expected, x, towards)[0]
    )


def test_words_that_are_looked_up_in_a_fixed_order_have_the_gradient_that_they_have() -> None:
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, generator=chance, requires_grad=True)
    words = torch.randint(0, 8, (3, 50), generator=chance)
    towards = torch.randn(3, 50, 4, generator=chance)

    mine, theirs = Looked.apply(words, weight), torch.nn.functional.embedding(words, weight)

    assert torch.equal(mine, theirs)
    assert torch.equal(
        torch.autograd.grad(mine, weight, towards)[0],
        torch.autograd.grad(theirs, weight, towards)[0],
    )
    assert torch.get_deterministic_debug_mode() == 0


def test_weights_are_a_function_of_the_seed_alone() -> None:
    one, same, other = tiny(1), tiny(1), tiny(2)

    for (name, a), b, c in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert "norm" in name or not torch.equal(a, c)


def test_an_untrained_model_is_as_unsure_as_it_should_be() -> None:
    model = tiny()
    tokens = torch.randint(0, TINY.vocab, (4, 33), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]) / (4 * 32)

    assert abs(loss.item() - torch.tensor(float(TINY.vocab)).log().item()) < 0.7


def test_the_model_learns_a_sequence_by_heart() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(0, TINY.vocab, (1, 17), generator=torch.Generator().manual_seed(0))

    for _ in range(80):
        loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]) / 16
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("9B", "expected one of debug, 8B, 70B, 405B"),
        ({"dim": 30, "layers": 1, "heads": 4, "kvHeads": 2, "ffnDim": 8}, "multiple of 2 x heads"),
        ({"dim": 32, "layers": 1, "heads": 4, "kvHeads": 3, "ffnDim": 8}, "multiple of kvHeads"),
        ({"dim": 32, "layers": 0, "heads": 4, "kvHeads": 2, "ffnDim": 8}, "a size is 0"),
        (
            {**msgspec.to_builtins(TINY), "ropeScaling": {"lowFreqFactor": 4}},
            "0 < lowFreqFactor < highFreqFactor",
        ),
        ({"dim": 32, "layer": 1}, "unknown field"),
        ({"dim": "wide"}, "Expected `int`"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_a_hint(model: object, says: str) -> None:
    with pytest.raises(MisconfiguredError) as caught:
        model_config(model)  # type: ignore[arg-type]

    assert says in str(caught.value)
    assert caught.value.hint


def test_fingerprints_differ_whenever_a_size_does() -> None:
    stretched = msgspec.structs.replace(TINY, rope_scaling=RopeScaling())
    prints = {config.fingerprint for config in [*PRESETS.values(), TINY, stretched]}
    assert len(prints) == len(PRESETS) + 2


def test_fingerprints_are_those_that_older_checkpoints_are_marked_with() -> None:
    assert TINY.fingerprint == "0e47fb5116cde896"
    assert PRESETS["8B"].fingerprint == "5850418b46ab72cc"
