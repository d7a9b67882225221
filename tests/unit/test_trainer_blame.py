"""A micro-batch that comes out otherwise on another rank says which rank is wrong."""

from collections.abc import Callable

import pytest

from orchestrator.protocol.layout import Layout
from trainer.blame import Chain, Digests, Mismatch, Verdict, judge, mismatches

RIGHT = (7,)
Rows = list[tuple[Digests, Digests]]


def alone(ranks: int) -> Chain:
    return Chain.of(Layout(dp_replicate=ranks))


def rounds(ranks: int, wrong: dict[int, int]) -> tuple[Rows, Callable[[int], list[Digests]]]:
    """Return what ranks say of their own and of the next one's micro-batch, all of them RIGHT."""
    digests: list[Digests] = [(wrong[rank],) if rank in wrong else RIGHT for rank in range(ranks)]
    return [(one, one) for one in digests], lambda _: digests


def test_ranks_that_agree_have_no_mismatch() -> None:
    assert mismatches([((1,), (2,)), ((2,), (3,)), ((3,), (1,))], 1) == []


def test_a_rank_that_is_always_wrong_shows_as_producer_and_as_replayer() -> None:
    rows, again = rounds(3, {1: 9})

    assert mismatches(rows, 1) == [Mismatch(1, 0), Mismatch(2, 1)]
    found = judge(rows, 1, again, alone(3))
    assert (found.ranks, found.proven) == ((1,), True)
    assert "rank 1 has 0000000000000009 for rank 1's micro-batch, 2 of 3 ranks" in found.evidence


def test_a_rank_that_was_wrong_once_is_named_by_what_it_had_said() -> None:
    rows, again = rounds(4, {})
    rows[2] = ((9,), RIGHT)

    assert judge(rows, 1, again, alone(4)).ranks == (2,)
    rows[2] = (RIGHT, (9,))
    assert judge(rows, 1, again, alone(4)).ranks == (2,)


def test_of_two_ranks_that_differ_nobody_is_named() -> None:
    rows, again = rounds(2, {1: 9})

    found = judge(rows, 1, again, alone(2))

    assert (found.ranks, found.proven) == ((0, 1), False)
    assert "no majority" in found.evidence


def test_of_ranks_that_compute_together_the_group_is_named_unless_one_differs_alone() -> None:
    """Ranks 2 and 3 are a group of `tp`; each has another part, and so another digest."""
    chain = Chain.of(Layout(dp_replicate=3, tp=2))
    right: list[Digests] = [(7,), (8,), (7,), (8,), (7,), (8,)]
    rows: Rows = [(own, own) for own in right]
    rows[2], rows[3] = ((91,), (7,)), ((92,), (8,))

    found = judge(rows, 2, lambda _: right, chain)
    assert (found.ranks, found.proven) == ((2, 3), True)
    assert found.evidence.endswith("ranks 2 to 3 compute together, and one may mislead the others")

    rows[2] = ((7,), (7,))
    found = judge(rows, 2, lambda _: right, chain)
    assert (found.ranks, found.proven) == ((3,), True)
    assert "together" not in found.evidence


def test_of_two_groups_that_differ_nobody_is_named() -> None:
    rows: Rows = [((7,), (7,)), ((8,), (8,)), ((7,), (7,)), ((9,), (8,))]

    found = judge(rows, 2, lambda _: [(7,), (8,), (7,), (8,)], Chain.of(Layout(2, tp=2)))

    assert (found.ranks, found.proven) == ((1, 3), False)


# Pipelines ------------------------------------------------------------------------------------

SENT = [(1, 0), (3, 1), (5, 2), (7, 2), (9, 1), (11, 0)]
"""When a stage of three sends something on, then back, and which one."""


def passed(chain: Chain, wrong_from: int = 100) -> list[Digests]:
    """Return what the members of a group come to, if all is wrong from a time on."""
    return [[time + 50 * (time >= wrong_from) for time in times] for times in chain.links]


def verdict(chain: Chain, own: dict[int, int], again: dict[int, int] | None = None) -> Verdict:
    """Return what is said of groups that were wrong from a time on, and are so now."""
    groups = range(len(chain.ranks) // chain.together)
    right = passed(chain)
    said = [digests for group in groups for digests in passed(chain, own.get(group, 100))]
    now = [d for group in groups for d in passed(chain, (again or {}).get(group, 100))]
    replayed = right * len(groups)
    return judge(list(zip(said, replayed, strict=True)), chain.together, lambda _: now, chain)


@pytest.mark.parametrize(("time", "stage"), SENT)
def test_of_a_pipeline_only_the_stage_that_was_wrong_first_is_named(time: int, stage: int) -> None:
    chain = Chain.of(Layout(dp_replicate=3, pp=3))

    found = verdict(chain, {1: time})

    assert (found.ranks, found.proven) == ((3 + stage,), True)
    assert f"rank {3 + stage} has {time + 50:016x} in what it sent" in found.evidence


def test_what_a_stage_received_otherwise_than_it_was_sent_proves_nothing_of_either() -> None:
    found = verdict(Chain.of(Layout(dp_replicate=3, pp=3)), {1: 4})

    assert (found.ranks, found.proven) == ((5,), False)
    assert "in what it received for" in found.evidence


def test_two_pipelines_that_differ_have_two_suspects_at_the_place_where_they_begin_to() -> None:
    found = verdict(Chain.of(Layout(dp_replicate=2, pp=3)), {1: 3})

    assert (found.ranks, found.proven) == ((1, 4), False)


def test_each_of_the_pipelines_that_are_wrong_has_its_own_culprit() -> None:
    found = verdict(Chain.of(Layout(dp_replicate=5, pp=3)), {1: 9}, {4: 1})

    assert (found.ranks, found.proven) == ((4, 12), True)


def test_stages_of_a_rank_that_has_several_are_looked_at_in_the_order_of_the_way() -> None:
    """Ranks 0 and 1 have stages 0 and 2, and 1 and 3."""
    chain = Chain.of(Layout(dp_replicate=3, pp=2), stages_each=2)

    assert chain.links == [[0, 1, 14, 15, 4, 5, 10, 11], [2, 3, 12, 13, 6, 7, 8, 9]]
    assert verdict(chain, {0: 5}).ranks == (0,)
    assert verdict(chain, {0: 7}).ranks == (1,)
    assert verdict(chain, {0: 11}).ranks == (0,)


def test_ranks_of_a_pipeline_are_found_wherever_shards_lie_between_them() -> None:
    """With two shards and two parts of layers, a pipeline is ranks 0, 1, 4, 5, or 2, 3, 6, 7."""
    layout = Layout(dp_replicate=3, pp=2, dp_shard=2, tp=2)
    chain = Chain.of(layout)

    assert (chain.ranks[:8], chain.together) == ([0, 1, 4, 5, 2, 3, 6, 7], 4)
    found = verdict(chain, {1: 3})
    assert (found.ranks, found.proven) == ((6, 7), True)
    assert found.evidence.endswith("ranks 6 to 7 compute together, and one may mislead the others")
