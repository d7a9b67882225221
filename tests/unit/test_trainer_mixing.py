"""Which source a sample comes from is a formula of its number."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.mixing import Mixture

WEIGHTS = st.lists(
    st.floats(1e-6, 1e6) | st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=6
)


@given(WEIGHTS, st.integers(0, 1 << 50))
def test_each_sample_comes_from_one_source_and_is_the_next_one_there(
    weights: list[float], sample: int
) -> None:
    mixture = Mixture(weights)

    source, offset = mixture.place(sample)

    before, after = mixture.offsets(sample), mixture.offsets(sample + 1)
    assert before[source] == offset
    assert after == tuple(o + (at == source) for at, o in enumerate(before))


@given(WEIGHTS, st.integers(0, 1 << 50))
def test_sources_are_never_further_from_their_share_than_there_are_others(
    weights: list[float], samples: int
) -> None:
    offsets = Mixture(weights).offsets(samples)

    assert sum(offsets) == samples
    for offset, weight in zip(offsets, weights, strict=True):
        off = abs(offset - samples * weight / sum(weights))
        assert off <= len(weights) / 2 + samples * 1e-12


def test_a_weight_is_taken_as_it_is_written() -> None:
    assert Mixture([0.1, 0.2, 0.7]).offsets(10**15) == (10**14, 2 * 10**14, 7 * 10**14)


def test_the_only_source_has_every_sample() -> None:
    assert [Mixture([0.3]).place(sample) for sample in range(3)] == [(0, 0), (0, 1), (0, 2)]


def test_sources_are_mixed_within_a_batch() -> None:
    sources = [Mixture([1, 2, 1]).place(sample)[0] for sample in range(8)]

    assert sorted(sources[:4]) == sorted(sources[4:]) == [0, 1, 1, 2]
