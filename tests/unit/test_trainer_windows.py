"""Every token of an epoch is in one window, whatever lengths windows have by then."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import cut
from trainer.windows import Windows

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@given(
    st.integers(12, 70),
    LENGTHS,
    st.lists(st.integers(0, 25), min_size=3, max_size=3),
    st.none() | st.integers(0, 9),
)
def test_no_token_is_in_two_windows_of_an_epoch_and_few_are_in_none(
    size: int, lengths: list[int], counts: list[int], seed: int | None
) -> None:
    firsts = [0, *np.cumsum(counts).tolist()][: len(lengths)]
    stages = list(zip(firsts, lengths, strict=True))
    windows = Windows(size, stages, seed)

    seen: dict[int, list[int]] = {}
    last: dict[int, int] = {}
    for number in range(firsts[-1] + 40):
        length = [length for first, length in stages if first <= number][-1]
        tokens = [token for start, stop in windows(number) for token in range(start, stop)]
        assert len(tokens) == length
        epoch = windows.epoch(number)
        seen.setdefault(epoch, []).extend(tokens)
        last[epoch] = length
    epochs = sorted(seen)

    assert epochs == list(range(len(epochs)))
    for epoch, after in pairwise(epochs):  # the last one is not at its end
        assert len(set(seen[epoch])) == len(seen[epoch])
        assert set(seen[epoch]) <= set(range(size))
        # Whoever begins the next epoch found no window of its own length any more.
        first = next(n for n in range(10**4) if windows.epoch(n) == after)
        length = [length for begin, length in stages if begin <= first][-1]
        assert size - len(seen[epoch]) < length


def test_windows_are_in_one_piece_but_for_what_stages_leave_of_their_last_blocks() -> None:
    windows = Windows(8 * 100 + 5, [(0, 2), (51, 4), (100, 8)], seed=3)
    pieces = {number: windows(number) for number in range(100 + 75)}

    # 62 blocks are whole; 5 tokens are behind the last, and the stages leave 2 and 4 of theirs.
    (put_together,) = [spans for spans in pieces.values() if len(spans) > 1]
    assert [stop - start for start, stop in put_together] == [5, 2, 1]
    starts = {number: spans[0][0] for number, spans in pieces.items()}
    # From all over the source, and not in the order in which it lies.
    assert max(starts[n] for n in range(51)) > 400
    assert min(starts[n] for n in range(51)) < 200
    assert [starts[n] for n in range(51)] != sorted(starts[n] for n in range(51))


def test_a_window_of_two_pieces_has_a_border_between_them_and_targets_from_each() -> None:
    ids = np.array([9, 1, 2, 3, 9, 4, 5, 6], np.uint32)

    batch = cut([(ids, [(5, 7), (0, 3)]), (ids, [(1, 6)])], bos=9)

    assert batch.inputs.tolist() == [[4, 5, 9, 1, 2], [1, 2, 3, 9, 4]]
    assert batch.targets.tolist() == [[5, 6, 1, 2, 3], [2, 3, 9, 4, 5]]
    assert batch.cuts == [[0, 2, 5], [0, 3, 5]]
