"""Where bits are not known to repeat, one rank is held to be wrong only if chance would not do."""

import re

import pytest

from trainer.blame import Verdict
from trainer.strikes import Strikes


def found(*ranks: int, proven: bool = True, same: bool = False) -> Verdict:
    return Verdict(ranks, proven=proven, evidence="differs", same=same)


@pytest.mark.parametrize(("groups", "needed"), [(2, 11), (3, 8), (8, 5), (32, 3), (1024, 2)])
def test_the_more_ranks_might_have_been_the_one_the_fewer_times_are_proof(
    groups: int, needed: int
) -> None:
    strikes = Strikes(groups)

    assert [strikes.hear(found(1)) for _ in range(needed - 1)] == [None] * (needed - 1)
    believed = strikes.hear(found(1))

    assert believed is not None
    assert (believed.ranks, believed.proven, strikes.reason) == ((1,), True, "")
    assert (1 / groups) ** (needed - 1) <= 1 / 1000


@pytest.mark.parametrize(
    ("heard", "names"),
    [
        ([found(1), found(2), found(1)], "now and then.*ranks 1, 2"),
        ([found(1, same=True)] * 3, "the same each time.*ranks 1"),
        ([found(0, 1, proven=False)] * 3, "now and then.*ranks 0, 1"),
        ([found(1)] * 4 + [found(2)], "5 times, now and then.*ranks 1, 2"),
    ],
)
def test_what_may_be_kernels_ends_it_and_accuses_nobody(heard: list[Verdict], names: str) -> None:
    strikes = Strikes(8)

    assert [strikes.hear(each) for each in heard] == [None] * len(heard)

    assert re.search(names, strikes.reason)
