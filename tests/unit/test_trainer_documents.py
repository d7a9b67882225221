"""Documents that share a sequence, against each of them alone."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trainer.config import ModelConfig
from trainer.documents import attend, block_mask, document_of, pairs, per_document, positions_of
from trainer.model import Llama

torch.set_num_threads(1)
CPU = torch.device("cpu")
TINY = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab=64)
borders = st.sets(st.integers(1, 299), max_size=9)


def dense_mask(cuts: list[list[int]], length: int) -> torch.Tensor:
    document = torch.from_numpy(document_of(cuts, length))
    same = document[:, None, :, None] == document[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool).tril()


@given(st.sets(st.integers(1, 23), max_size=5), st.integers(0, 5))
@settings(max_examples=25)
def test_packed_documents_give_what_each_gives_alone_up_to_its_position(
    borders: set[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, 24, 8, generator=generator) for h in (4, 2, 2))
    cuts = [[0, *sorted(borders), 24]]

    apart = per_document(q, k, v, cuts)

    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=dense_mask(cuts, 24), enable_gqa=True
    )
    torch.testing.assert_close(apart, dense, atol=1e-5, rtol=1e-5)


@given(borders, borders, st.sampled_from([300, 384, 512]))
@settings(max_examples=25)
def test_blocks_worked_out_on_the_host_are_those_that_the_mask_has(
    one: set[int], other: set[int], length: int
) -> None:
    cuts = [[0, *sorted(one), length], [0, *sorted(other), length]]
    document = torch.from_numpy(document_of(cuts, length))

    mask = block_mask(cuts, length, CPU)

    def within(b: torch.Tensor, _: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (document[b, q] == document[b, k])

    drawn = create_block_mask(within, 2, 1, length, length, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        for what in ("num_blocks", "indices"):
            mine, theirs = (getattr(whose, f"{name}_{what}") for whose in (mask, drawn))
            assert torch.equal(mine, theirs), (name, what)
            # Kernels take it for granted, and read other numbers otherwise.
            assert mine.stride() == theirs.stride(), (name, what)
    assert mask.seq_lengths == drawn.seq_lengths


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_kernel_over_blocks_sees_what_documents_see_one_by_one() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 300, 16, generator=generator) for h in (4, 2, 2))
    cuts = [[0, 5, 130, 131, 300], [0, 300]]

    with torch.no_grad():
        blocks = flex_attention(q, k, v, block_mask=block_mask(cuts, 300, CPU), enable_gqa=True)

    assert isinstance(blocks, torch.Tensor)
    torch.testing.assert_close(blocks, attend(q, k, v, cuts), atol=1e-5, rtol=1e-5)


@given(st.sets(st.integers(1, 23), max_size=5))
@settings(max_examples=10)
def test_documents_whose_positions_begin_anew_give_what_each_gives_alone(inner: set[int]) -> None:
    model = Llama(TINY)
    model.init_weights(0)
    tokens = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(len(inner)))
    cuts = [[0, *sorted(inner), 24]]

    with torch.no_grad():
        running = model(tokens, cuts)
        model.rotary.restarts = True
        packed = model(tokens, cuts)
        alone = torch.cat([model(tokens[:, a:b]) for a, b in itertools.pairwise(cuts[0])], 1)

    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed, running, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuts", [[[0, 24]], [[0, 1, 7, 24], [0, 23, 24]]])
def test_positions_and_pairs_are_those_of_a_count_by_hand(cuts: list[list[int]]) -> None:
    spans = [list(itertools.pairwise(row)) for row in cuts]

    assert positions_of(cuts, 24).tolist() == [
        [at - a for a, b in row for at in range(a, b)] for row in spans
    ]
    assert pairs(cuts) == int(np.sum([dense_mask([row], 24).sum() for row in cuts]))
