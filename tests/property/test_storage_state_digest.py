"""The state digest knows the state and not the sharding."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage.digest import combine, partial_digest

DTYPES = st.sampled_from(["u1", "i2", "f4", "u4", "f8", "i8"])


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(DTYPES))
    count = draw(st.integers(2, 200))
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    return np.frombuffer(raw, dtype)


@given(tensors(), st.data())
def test_any_cut_in_any_order_gives_the_digest_of_the_whole(
    tensor: np.ndarray, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, tensor.size), max_size=6)))
    bounds = list(zip([0, *cuts], [*cuts, tensor.size], strict=True))

    parts = [
        partial_digest("w", tensor[start:end], start=start)
        for start, end in data.draw(st.permutations(bounds))
    ]

    assert combine(parts) == partial_digest("w", tensor)


@given(tensors(), st.data())
def test_one_flipped_bit_changes_both_lanes(tensor: np.ndarray, data: st.DataObject) -> None:
    flipped = bytearray(tensor.tobytes())
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    before = partial_digest("w", tensor)
    after = partial_digest("w", np.frombuffer(flipped, tensor.dtype))

    assert before[0] != after[0]
    assert before[1] != after[1]


@given(tensors(), st.data())
def test_two_unequal_elements_that_change_places_change_the_digest(
    tensor: np.ndarray, data: st.DataObject
) -> None:
    one, two = (data.draw(st.integers(0, tensor.size - 1)) for _ in range(2))
    swapped = tensor.copy()
    swapped[[one, two]] = tensor[[two, one]]

    same = partial_digest("w", tensor) == partial_digest("w", swapped)

    assert same == (tensor.tobytes() == swapped.tobytes())


@given(tensors(), tensors())
def test_two_tensors_that_change_names_change_the_digest(a: np.ndarray, b: np.ndarray) -> None:
    before = combine([partial_digest("a", a), partial_digest("b", b)])
    after = combine([partial_digest("b", a), partial_digest("a", b)])

    if a.dtype == b.dtype:
        assert (before == after) == (a.tobytes() == b.tobytes())


@given(st.integers(0, 2**40), st.sampled_from([32_767, 32_768, 32_769, 70_000]))
def test_a_piece_longer_than_one_pass_is_the_sum_of_its_halves(start: int, count: int) -> None:
    piece = np.arange(count, dtype=np.float32)
    half = count // 2

    whole = partial_digest("w", piece, start=start)

    assert whole == combine(
        [
            partial_digest("w", piece[:half], start=start),
            partial_digest("w", piece[half:], start=start + half),
        ]
    )


@given(st.sampled_from([(5, 7), (300, 250), (1, 40_000), (40_000, 2)]), st.data())
def test_blocks_of_columns_give_the_digest_of_the_whole(
    shape: tuple[int, int], data: st.DataObject
) -> None:
    tensor = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[1]), max_size=2)))
    top = data.draw(st.integers(0, shape[0]))
    columns = zip([0, *cuts], [*cuts, shape[1]], strict=True)

    parts = [
        partial_digest("w", tensor[rows, a:b], start=rows.start * shape[1] + a, row=shape[1])
        for a, b in columns
        for rows in (slice(0, top), slice(top, shape[0]))
    ]

    assert combine(parts) == partial_digest("w", tensor)
