"""A rank that lets others wait is named by the process groups in which they wait."""

import pytest

from orchestrator.core import snapshot
from orchestrator.core.decisions import StartGeneration
from orchestrator.detect import awaited
from orchestrator.protocol.ids import Rank
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import GroupCounts
from orchestrator.protocol.phases import RankPhase
from tests.conftest import Cluster
from tests.meshes import Mesh, Run

TP = Layout(dp_shard=2, tp=2)


def waiting(layout: Layout, rank: int, stops: int) -> tuple[GroupCounts, ...]:
    """Return what nodes say once a rank has stopped before so much of its step."""
    mesh = Mesh(layout)
    programs = [mesh.schedule(each, ("tp", "dp_shard"), 1) for each in range(mesh.size)]
    return Run(mesh, programs, {rank: stops}).told()


def leaving_out(layout: Layout, kinds: tuple[str, ...], rank: int, place: int) -> Run:
    """Return a step in which a rank leaves out one of the collectives of its program."""
    mesh = Mesh(layout)
    programs = [mesh.schedule(each, kinds, 2) for each in range(mesh.size)]
    del programs[rank][place]
    return Run(mesh, programs, {})


def stand_still(cluster: Cluster, told: tuple[GroupCounts, ...]) -> StartGeneration:
    """Have nobody move from now on; return what is decided in the end."""
    phases = {1: RankPhase.BACKWARD, 2: RankPhase.BACKWARD}
    for _ in range(200):
        cluster.after(0.1)
        step = cluster.state.reached_step
        found = cluster.beat(step=step, moving=lambda _: False, phases=phases, groups=told)
        if orders := [each for each in found if isinstance(each, StartGeneration)]:
            return orders[0]
    pytest.fail("nothing was decided")


@pytest.fixture
def trained(cluster: Cluster) -> Cluster:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    return cluster


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("stops", [0, 1, 2])
def test_whoever_never_came_to_its_tp_or_dp_collective_leaves_and_nobody_else(
    trained: Cluster, rank: int, stops: int
) -> None:
    order = stand_still(trained, waiting(TP, rank, stops))

    assert order.dismiss == (rank,)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("rank", range(4))
def test_whoever_leaves_out_a_collective_and_goes_on_leaves_though_it_waits_as_all_do(
    trained: Cluster, rank: int, place: int
) -> None:
    """Four replicas: each waits for the others, in one place or in another."""
    run = leaving_out(Layout(dp_replicate=4), ("dp_replicate",), rank, place)

    assert stand_still(trained, run.told()).dismiss == (rank,)


@pytest.mark.parametrize("rank", range(4))
def test_of_groups_of_two_nobody_is_named_who_left_out_nothing(trained: Cluster, rank: int) -> None:
    for place in range(4):
        run = leaving_out(TP, ("tp", "dp_shard"), rank, place)
        trained.state.fleet.groups.clear()
        trained.beat(step=5, groups=run.told())

        assert set(awaited.culprits(trained.state)) <= {rank}


def test_whoever_enters_another_collective_leaves_and_it_is_said_which(trained: Cluster) -> None:
    titles = ("allreduce of 64 B",) * 2, ("allgather of 8 B", "allreduce of 64 B")
    told = tuple(
        GroupCounts("all", ranks, (7, 7), (6, 6), what)
        for ranks, what in zip(((Rank(0), Rank(1)), (Rank(2), Rank(3))), titles, strict=True)
    )

    order = stand_still(trained, told)

    assert order.dismiss == (2,)
    words = trained.state.incidents[-1].findings[0].evidence
    assert "waits in 7 of all for allgather of 8 B and ranks 0, 1, 3 wait there for" in words


def test_it_is_said_in_which_group_who_waits_for_it(trained: Cluster) -> None:
    stand_still(trained, waiting(TP, 2, 0))

    words = trained.state.incidents[-1].findings[0].evidence
    assert "is in no collective, has entered 0 of dp_shard@0 and rank 0 waits there in 1" in words


def test_one_node_that_says_nothing_of_groups_is_not_named_for_that(trained: Cluster) -> None:
    """Ranks 0 and 1 count all collectives as one, as a program of another version would."""
    told = tuple(row for row in waiting(TP, 2, 0) if row.ranks[0] >= 2)
    totals = GroupCounts("all", (Rank(0), Rank(1)), (9, 9), (8, 8))

    assert stand_still(trained, (*told, totals)).dismiss == (2,)


def test_where_nobody_knows_in_what_the_others_wait_it_is_who_waits_for_nobody(
    trained: Cluster,
) -> None:
    told = waiting(TP, 2, 0)
    beat = [row for row in told if row.group == "all"]
    trained.beat(step=5, groups=(*beat, GroupCounts("tp@0", (Rank(0),), (0,), (0,))))
    fleet = trained.state.fleet
    fleet.join((5, 5, 4, 5), (4, 4, 4, 4))

    assert awaited.culprits(trained.state) == (2,)


def test_groups_are_part_of_what_a_successor_goes_on_from(trained: Cluster) -> None:
    told = waiting(TP, 1, 1)
    trained.after(0.1).beat(step=5, moving=lambda _: False, groups=told)
    successor = Cluster()
    restored = snapshot.restore(snapshot.take(trained.controller), successor.controller)

    assert restored.state.fleet.groups == trained.state.fleet.groups
    assert list(restored.state.fleet.groups.values()) == list(told)


def test_a_node_that_makes_up_groups_without_end_is_not_remembered_without_end(
    trained: Cluster,
) -> None:
    for number in range(100):
        one = tuple(GroupCounts(f"g{number}.{n}", (Rank(3),), (1,), (0,)) for n in range(10))
        trained.after(0.01).beat(step=5, groups=one)

    assert len(trained.state.fleet.groups) == 16 * 4
