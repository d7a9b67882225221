"""Which sample is which, and what it consists of."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.protocol import runfile
from orchestrator.worker import MisconfiguredError
from trainer.data import Samples
from trainer.joined import Joined
from trainer.tokens import Tokens
from trainer.windows import shuffled

IDS = np.random.default_rng(1).integers(0, 1000, 1000).astype(np.uint32)


def samples(seed: int = 0, batch: int = 8) -> Samples:
    job = runfile.Trainer(seq_len=16, global_batch=batch, seed=seed)
    return Samples(Tokens(IDS, "d16e57000000", 1024), job)


@given(st.integers(1, 300), st.integers(0, 1 << 40), st.integers(0, 1 << 20))
def test_an_epoch_is_a_permutation_whatever_its_size(size: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(i, size, (seed, epoch)) for i in range(size)) == list(range(size))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {
        tuple(shuffled(i, 50, key) for i in range(50)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    assert len(orders) == 4


def test_a_sample_does_not_depend_on_how_many_ranks_share_the_batch() -> None:
    data = samples()

    whole = data.batch(5, range(8))

    for ranks in (1, 2, 4, 8):
        share = 8 // ranks
        parts = [data.batch(5, range(r * share, (r + 1) * share)) for r in range(ranks)]
        assert np.array_equal(np.concatenate([part.inputs for part in parts]), whole.inputs)
        assert [cut for part in parts for cut in part.cuts] == whole.cuts


def test_every_sample_is_seen_once_per_epoch() -> None:
    data = samples(batch=1)
    seen = [
        data.batch(step, range(1)).inputs.tobytes() for step in range(1, 2 * data.counts[0] + 1)
    ]

    assert data.counts == [62]
    assert len(set(seen[:62])) == 62
    assert set(seen[:62]) == set(seen[62:])
    assert seen[:62] != seen[62:]


def test_targets_are_the_tokens_that_follow() -> None:
    batch = samples().batch(1, range(8))

    assert np.array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_documents_are_cut_where_one_begins() -> None:
    ids = np.zeros(33, np.uint32)
    ids[[0, 5, 16, 31]] = 1024
    data = Samples(Tokens(ids, "0", 1024), runfile.Trainer(seq_len=16, global_batch=2))

    cuts = data.batch(1, range(2)).cuts

    assert sorted(cuts) == [[0, 5, 16], [0, 15, 16]]


def test_a_text_shorter_than_one_sequence_is_refused() -> None:
    with pytest.raises(MisconfiguredError, match="has 16 tokens, expected more than"):
        Samples(Tokens(IDS[:16], "0", 1024), runfile.Trainer(seq_len=16))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 12), st.integers(0, 12))
def test_arrays_that_are_joined_are_sliced_like_one(
    sizes: list[int], start: int, stop: int
) -> None:
    ids = np.arange(sum(sizes), dtype=np.uint32)
    joined = Joined(np.split(ids, np.cumsum(sizes)[:-1]))

    assert len(joined) == len(ids)
    assert joined[start:stop].tolist() == ids[start:stop].tolist()
    assert joined[start:].tolist() == ids[start:].tolist()
