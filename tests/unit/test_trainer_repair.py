"""Who is outvoted by those that hold the same, and of what."""

import pytest

from trainer.repair import ALIKE, OUTVOTED, SEVERAL, UNDECIDED, Vote, vote


def test_who_holds_something_else_than_all_others_is_outvoted_whichever_of_them_it_is() -> None:
    for outvoted in range(4):
        rows = [[7, 8, 9] for _ in range(4)]
        rows[outvoted] = [7, 0, 1]

        assert vote(rows) == (Vote(OUTVOTED, outvoted, int(outvoted == 0), 2), (1, 2))


def test_who_is_outvoted_in_several_things_in_several_ways_is_one() -> None:
    assert vote([[1, 2], [1, 2], [3, 4]]) == (Vote(OUTVOTED, 2, 0, 2), (0, 1))


@pytest.mark.parametrize(
    ("rows", "outcome"),
    [
        ([[1], [1], [1]], ALIKE),
        ([[1]], ALIKE),
        ([[1], [2]], UNDECIDED),
        ([[1], [1], [2], [2]], UNDECIDED),
        ([[1], [2], [3]], UNDECIDED),
        ([[1], [1], [1], [2], [3]], SEVERAL),
        ([[1, 1], [1, 1], [2, 1], [1, 2], [1, 1]], SEVERAL),
    ],
)
def test_nobody_is_outvoted_without_a_majority_or_together_with_others(
    rows: list[list[int]], outcome: int
) -> None:
    assert vote(rows) == (Vote(outcome), ())
