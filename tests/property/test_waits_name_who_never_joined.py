"""Whoever did not enter the collective that the others wait in is named, and nobody else."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.detect.waiting import culprits, culprits_among, gathered, minority
from orchestrator.protocol.groups import ALL
from orchestrator.protocol.layout import Layout
from tests.meshes import DIMENSIONS, Mesh, Run

Program = list[int]
"""Which group each collective of the job is of, in the order in which every member enters it."""


def groups(data: st.DataObject, ranks: int) -> np.ndarray:
    """Draw groups: everybody, and some of which each rank is in one."""
    cut = np.array(data.draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)))
    return np.stack([np.ones(ranks, np.bool_), *(cut == part for part in np.unique(cut))])


def run(member: np.ndarray, program: Program, stuck: set[int], at: int) -> tuple[np.ndarray, ...]:
    """Return collectives that ranks entered and left when nobody moves any more."""
    count, ranks = member.shape
    entered, left = np.zeros((2, count, ranks), np.int64)
    place = [0] * ranks
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            mine = [g for g in program if member[g, rank]]
            if place[rank] >= len(mine) or (rank in stuck and place[rank] >= at):
                continue
            group = mine[place[rank]]
            if entered[group, rank] == left[group, rank]:
                entered[group, rank] += 1
                moved = True
            if (entered[group, member[group]] >= entered[group, rank]).all():
                left[group, rank] += 1
                place[rank] += 1
                moved = True
    return entered, left


@given(st.data(), st.integers(2, 9), st.integers(0, 5))
def test_of_ranks_that_wait_for_one_it_is_named_wherever_it_stopped(
    data: st.DataObject, ranks: int, at: int
) -> None:
    member = groups(data, ranks)
    program = data.draw(st.lists(st.integers(0, len(member) - 1), min_size=8, max_size=20))
    program += [0]  # in the end everybody meets
    stuck = data.draw(st.integers(0, ranks - 1))
    entered, left = run(member, program, {stuck}, at)

    assert culprits(entered, left, member).tolist() == [stuck]


@given(st.data(), st.integers(3, 9))
def test_of_several_that_stopped_none_is_named_that_did_not(
    data: st.DataObject, ranks: int
) -> None:
    member = groups(data, ranks)
    program = [*data.draw(st.lists(st.integers(0, len(member) - 1), min_size=8, max_size=20)), 0]
    stuck = data.draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=ranks - 1))
    entered, left = run(member, program, stuck, 3)

    named = set(culprits(entered, left, member).tolist())
    assert named
    assert named <= stuck


@given(st.data(), st.integers(1, 9))
def test_nobody_is_named_while_all_have_entered_what_they_wait_in(
    data: st.DataObject, ranks: int
) -> None:
    member = groups(data, ranks)
    entered = np.where(member, 7, 0)

    assert culprits(entered, entered - 1, member).size == 0
    assert culprits(entered, entered, member).size == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_a_minority_is_fewer_than_half_and_fewer_than_any_other(keys: list[int]) -> None:
    found = minority(np.array(keys)).tolist()

    if found:
        odd = keys[found[0]]
        assert [rank for rank, key in enumerate(keys) if key == odd] == found
        assert 2 * len(found) < len(keys)
        assert all(keys.count(other) > len(found) for other in set(keys) - {odd})


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    """Draw a world of up to 16 ranks, cut in up to five dimensions."""
    sizes: list[int] = []
    for _ in range(5):
        sizes.append(draw(st.sampled_from([n for n in (1, 2, 3) if n * math.prod(sizes) <= 16])))
    return Mesh(Layout(*draw(st.permutations(sizes))))


@given(meshes(), st.data())
def test_of_any_mesh_it_is_who_stopped_wherever_in_its_step_and_nobody_else(
    mesh: Mesh, data: st.DataObject
) -> None:
    if mesh.size == 1:
        return
    within = [kind for kind in DIMENSIONS if kind != "pp"]
    # All of a pipeline can not meet before a micro-batch has gone through it.
    kinds = data.draw(st.lists(st.sampled_from([*within, *[ALL] * (mesh.layout.pp == 1)])))[:4]
    micro_batches = data.draw(st.integers(1, 3))
    programs = [mesh.schedule(rank, kinds, micro_batches) for rank in range(mesh.size)]
    stuck = data.draw(st.integers(0, mesh.size - 1))
    at = data.draw(st.integers(0, len(programs[stuck]) - 1))
    run = Run(mesh, programs, {stuck: at})

    counts, _ = gathered(data.draw(st.permutations(run.told())), mesh.size)

    assert culprits_among(counts, mesh.size).tolist() == [stuck]
