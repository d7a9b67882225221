"""Who is named of ranks in several process groups, case by case."""

from typing import NamedTuple

import pytest

from orchestrator.detect import awaited
from orchestrator.detect.waiting import (
    culprits_among,
    gathered,
    strangers,
    strangers_to_peers,
)
from orchestrator.protocol.groups import ALL
from orchestrator.protocol.ids import Rank
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import GroupCounts
from tests.meshes import Do, Mesh, Run

TP_2_DP_2 = Layout(dp_shard=2, tp=2)
PP_2_TP_2 = Layout(pp=2, tp=2)
PP_4 = Layout(pp=4)
FULL = Layout(dp_replicate=2, pp=2, dp_shard=2, tp=2)


class Case(NamedTuple):
    layout: Layout
    kinds: tuple[str, ...]
    rank: int
    before: Do
    """The first of these is what it never comes to."""
    at: dict[int, str]
    """In what some of the others wait by then."""


CASES = {
    "before tp: its neighbour waits in tp, the others in dp for both": Case(
        TP_2_DP_2, ("tp", "dp_shard"), 2, ("meet", "tp@2"),
        {3: "tp@2", 0: "dp_shard@0", 1: "dp_shard@1"},
    ),
    "before dp: who holds the same cut waits in dp, their neighbours in tp, one round later": Case(
        TP_2_DP_2, ("tp", "dp_shard"), 1, ("meet", "dp_shard@1"),
        {3: "dp_shard@1", 0: "tp@0", 2: "tp@2"},
    ),
    "before all: everybody waits there": Case(
        TP_2_DP_2, ("tp",), 3, ("meet", "all"), {0: "all", 1: "all", 2: "all"}
    ),
    "the first stage before it sends: stages wait for the ones before them": Case(
        PP_4, (), 0, ("send", "pp 0>1"), {1: "pp 0>1", 2: "pp 1>2", 3: "pp 2>3"}
    ),
    "the last stage before it sends back: stages wait for the ones behind them": Case(
        PP_4, (), 3, ("send", "pp 3>2"), {0: "pp 1>0", 1: "pp 2>1", 2: "pp 3>2"}
    ),
    "a stage before tp: both its neighbours wait, in different things": Case(
        PP_2_TP_2, ("tp",), 2, ("meet", "tp@2"), {3: "tp@2", 0: "pp 2>0", 1: "pp 3>1"}
    ),
    "in five dimensions before tp": Case(
        FULL, ("tp", "dp_shard", "dp_replicate"), 13, ("meet", "tp@12"), {12: "tp@12"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_who_stopped_is_named_and_not_who_waits_for_it(case: Case) -> None:
    mesh = Mesh(case.layout)
    programs = [mesh.schedule(rank, case.kinds, 2) for rank in range(mesh.size)]
    run = Run(mesh, programs, {case.rank: programs[case.rank].index(case.before)})
    counts, names = gathered(run.told(), mesh.size)
    waits = dict(
        zip(
            counts.rank[counts.waits].tolist(),
            [names[group] for group in counts.group[counts.waits]],
            strict=True,
        )
    )

    assert {rank: waits[rank] for rank in case.at} == case.at
    assert case.rank not in waits
    assert culprits_among(counts, mesh.size).tolist() == [case.rank]


def test_nobody_is_named_while_everybody_goes_on() -> None:
    mesh = Mesh(FULL)
    run = Run(mesh, [mesh.schedule(r, ("tp", "dp_shard"), 2) for r in range(mesh.size)], {})

    counts, _ = gathered(run.told(), mesh.size)

    assert run.done()
    assert culprits_among(counts, mesh.size).tolist() == []


def test_what_a_node_said_last_counts() -> None:
    ranks = Rank(0), Rank(1)
    before = GroupCounts("tp@0", ranks, (3, 2), (2, 2))
    after = GroupCounts("tp@0", ranks, (4, 5), (4, 4))

    counts, names = gathered([before, GroupCounts(ALL, ranks, (1, 1), (1, 1)), after], 2)

    assert names == ["tp@0", ALL]
    assert dict(zip(counts.rank.tolist(), counts.entered.tolist(), strict=False)) == {0: 1, 1: 1}
    assert counts.entered[counts.group == 0].tolist() == [4, 5]
    assert culprits_among(counts, 2).tolist() == [0]


def test_who_waits_in_what_nobody_tells_apart_is_not_at_fault_as_far_as_is_known() -> None:
    ranks = tuple(map(Rank, range(4)))
    counts, _ = gathered([GroupCounts(ALL, ranks, (8, 8, 7, 7), (7, 7, 7, 7))], 4)
    elsewhere = counts.rank == 3

    assert culprits_among(counts, 4).tolist() == [2, 3]
    assert culprits_among(counts, 4, elsewhere).tolist() == [2]


def test_who_sends_is_waited_for_and_who_receives_is_not_to_blame_whatever_it_counted() -> None:
    """A stage that waits for a gradient has been sent more activations than it has waited for."""
    one, two = Rank(0), Rank(1)
    told = [
        GroupCounts("pp 0>1", (one, two), (3, 2), (3, 2)),
        GroupCounts("pp 1>0", (one, two), (2, 2), (2, 2)),
        GroupCounts("pp 1>2", (two, Rank(2)), (2, 3), (2, 2)),
        GroupCounts("pp 2>1", (two, Rank(2)), (1, 1), (0, 1)),
    ]

    assert culprits_among(gathered(told, 3)[0], 3).tolist() == []


def entered(*titles: str, at: tuple[int, ...] = (), group: str = "all") -> GroupCounts:
    """Return what ranks that wait in one group say of it."""
    ranks = tuple(map(Rank, range(len(titles))))
    counts = at or (7,) * len(titles)
    return GroupCounts(group, ranks, counts, tuple(n - 1 for n in counts), titles)


SUM, GATHER = "allreduce of 4096 B", "allgather of 24 B"


@pytest.mark.parametrize(
    ("told", "named"),
    [
        (entered(SUM, GATHER, SUM), [1]),
        (entered(SUM, SUM, SUM), []),
        (entered(SUM, GATHER), []),
        (entered(SUM, GATHER, "barrier"), []),
        (entered(SUM, "", SUM), []),
        (entered(SUM, GATHER, SUM, at=(7, 8, 7)), []),
        (entered(SUM, GATHER, SUM, GATHER, SUM), [1, 3]),
        (entered(SUM, "allreduce of 8 B", SUM), [1]),
        (entered(SUM, GATHER, SUM, group="pp 0>1"), []),
    ],
    ids=[
        "another one", "the same", "one against one", "each its own", "who says nothing",
        "not the same place", "two of five", "another shape", "a connection",
    ],
)  # fmt: skip
def test_who_waits_in_another_collective_than_most_at_the_same_place_is_named(
    told: GroupCounts, named: list[int]
) -> None:
    assert strangers(gathered([told], 5)[0]).tolist() == named


def apart(places: dict[str, tuple[tuple[int, int, int, str], ...]]) -> list[int]:
    """Return who is named of ranks that entered, left and came to something, by group."""
    told = [
        GroupCounts(
            group,
            tuple(Rank(rank) for rank, *_ in rows),
            tuple(entered for _, entered, *_ in rows),
            tuple(left for _, _, left, _ in rows),
            tuple(what for *_, what in rows),
        )
        for group, rows in places.items()
    ]
    counts, names = gathered(told, 8)
    return strangers_to_peers(counts, awaited.kinds(names)[counts.group]).tolist()


ONE_EACH = ((0, 7, 6, SUM), (1, 7, 6, GATHER))


@pytest.mark.parametrize(
    ("places", "named"),
    [
        ({"tp@0": ONE_EACH, "tp@2": ((2, 7, 7, SUM), (3, 7, 7, SUM))}, [1]),
        ({"tp@0": ONE_EACH, "tp@2": ((2, 7, 7, GATHER), (3, 7, 7, GATHER))}, [0]),
        ({"tp@0": ONE_EACH}, []),
        ({"tp@0": ONE_EACH, "shard@0": ((2, 7, 7, SUM), (3, 7, 7, SUM))}, []),
        ({"tp@0": ONE_EACH, "tp@2": ((2, 8, 7, SUM), (3, 8, 7, SUM))}, []),
        ({"tp@0": ONE_EACH, "tp@2": ((2, 7, 7, "barrier"), (3, 7, 7, "barrier"))}, []),
        ({"tp@0": ONE_EACH, "tp@2": ((2, 7, 7, "a"), (3, 7, 7, "a"), (4, 7, 7, "a"))}, []),
        ({"tp@0": ((0, 7, 6, SUM), (1, 7, 6, SUM)), "tp@2": ONE_EACH[1:]}, []),
    ],
    ids=[
        "peers did the same as one", "as the other one", "no peers", "of another kind",
        "elsewhere by now", "something else", "most did something else", "no dispute",
    ],
)  # fmt: skip
def test_of_a_group_of_two_whoever_does_otherwise_than_peers_in_other_groups_is_named(
    places: dict[str, tuple[tuple[int, int, int, str], ...]], named: list[int]
) -> None:
    assert apart(places) == named


def named_without(mesh: Mesh, kinds: tuple[str, ...], rank: int, place: int) -> list[int] | None:
    """Return who is named once a rank has left out a collective; None if nobody waits for it."""
    programs = [2 * mesh.schedule(each, kinds, 2) for each in range(mesh.size)]
    del programs[rank][place]
    run = Run(mesh, programs, {})
    if run.done():
        return None
    counts, names = gathered(run.told(), mesh.size)
    if by_graph := culprits_among(counts, mesh.size).tolist():
        return by_graph
    by_kind = awaited.by_kind(counts, names, mesh.size)
    return awaited.left_out(*by_kind, awaited.stages(mesh.layout, mesh.size)).tolist()


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        (Layout(dp_replicate=3), ("dp_replicate",)),
        (Layout(dp_shard=4, tp=4), ("tp", "dp_shard")),
        (Layout(dp_shard=2, tp=2), ("tp", "dp_shard")),
        (Layout(dp_replicate=2, dp_shard=2), ("dp_shard", "dp_replicate")),
    ],
    ids=str,
)
def test_whoever_leaves_out_any_collective_is_named_where_three_ranks_run_the_same_program(
    layout: Layout, kinds: tuple[str, ...]
) -> None:
    mesh = Mesh(layout)
    places = len(2 * mesh.schedule(0, kinds, 2))

    for rank in range(0, mesh.size, 5):
        for place in range(places):
            assert named_without(mesh, kinds, rank, place) == [rank], place


def test_in_a_mesh_of_groups_of_two_nobody_is_named_without_whoever_left_one_out() -> None:
    mesh, kinds = Mesh(FULL), ("tp", "dp_shard", "dp_replicate")
    exact = total = 0
    for rank in (0, 13):
        for place, (do, _) in enumerate(2 * mesh.schedule(rank, kinds, 2)):
            if do != "meet":
                continue
            named = named_without(mesh, kinds, rank, place)
            assert named is not None
            assert not named or (rank in named and len(named) <= 2)
            exact += named == [rank]
            total += 1
    assert 0.8 * total < exact < total
