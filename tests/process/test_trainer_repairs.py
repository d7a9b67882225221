"""A rank whose state goes bad is given what its twins hold, if no step that counts has used it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tests.programs.forked import found_by
from tests.programs.repaired import AT, BAD, REPLICAS, UPDATE, WAYS

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]
Found = dict[str, list[dict[str, Any]]]
DEADLY = "dies of it"
"""Nothing can come behind it."""
WEIGHT = "weights of layers.0.attention.wq.weight"


def train(folder: Path, cut: str, size: int, ways: Collection[str]) -> Found:
    """Return what each rank found, by rank, of some ways in which state may go bad."""
    return found_by("repaired", folder, cut, size, ways, replicas=REPLICAS, dies=DEADLY in ways)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    ways = [way for way in WAYS if way != DEADLY]
    return train(tmp_path_factory.mktemp("repaired"), "tp", 1, ways)


def came_to(found: Found, way: str) -> list[tuple[str, list[str]]]:
    """Return the state that each rank ends with, and the losses on the way there."""
    return [(rank["state"], rank["losses"]) for rank in found[way]]


@pytest.mark.parametrize(
    ("way", "tensors"),
    [
        ("a weight", [WEIGHT]),
        ("a weight, and replayed", [WEIGHT]),
        ("a weight, read ahead", [WEIGHT]),
        ("a moment", ["exp_avg of layers.0.attention.wq.weight"]),
        ("the other moment", ["exp_avg_sq of layers.0.attention.wq.weight"]),
        ("the sum of gradients", []),
        ("a digest", []),
    ],
)
def test_what_goes_bad_before_a_step_is_copied_from_a_twin_and_all_ends_with_the_same_bits(
    found: Found, way: str, tensors: list[str]
) -> None:
    assert came_to(found, way) == came_to(found, "nothing")
    told = [rank["repairs"] for rank in found[way]]
    assert told == [[[AT, BAD, 0, tensors]], [], [[AT, BAD, 0, tensors]]]
    assert [rank["refused"] + rank["accused"] for rank in found[way]] == [[]] * REPLICAS


def test_a_step_that_was_computed_from_a_wrong_weight_is_computed_again_in_any_reduction(
    found: Found,
) -> None:
    way, tensors = "a weight, deterministic", [WEIGHT]

    assert came_to(found, way) == came_to(found, "nothing, deterministic")
    assert [rank["repairs"] for rank in found[way]] == [
        [[AT, BAD, 0, tensors]],
        [],
        [[AT, BAD, 0, tensors]],
    ]
    assert [rank["accused"] for rank in found[way]] == [[]] * REPLICAS


def test_a_weight_that_goes_bad_while_a_step_is_computed_is_repaired_in_that_step(
    found: Found,
) -> None:
    way = "a weight while it computes"

    assert came_to(found, way) == came_to(found, "nothing")
    assert found[way][0]["repairs"] == [[AT, BAD, 0, [WEIGHT]]]


def test_a_rank_that_counts_steps_wrongly_is_told_the_count_with_the_state(found: Found) -> None:
    way = "the count of steps"

    assert came_to(found, way) == came_to(found, "nothing")
    ((step, rank, _, tensors),) = found[way][0]["repairs"]
    assert (step, rank) == (AT, BAD), "the update before it was the wrong one"
    assert any(name.startswith("weights of") for name in tensors)


def test_an_update_that_came_out_wrong_is_put_right_by_who_did_it_with_no_replica_asked(
    found: Found,
) -> None:
    way = "an update, and nothing is compared"

    assert came_to(found, way) == came_to(found, "nothing")
    own = [[UPDATE, BAD, BAD, [WEIGHT]]]
    assert [rank["repairs"] for rank in found[way]] == [[], own, []]
    assert [rank["off"] + rank["accused"] for rank in found[way]] == [[]] * REPLICAS


def test_what_ranks_were_brought_to_wrongly_is_repaired_in_the_first_step(found: Found) -> None:
    way = "in the first step, in parts"

    assert came_to(found, way) == came_to(found, "nothing")
    assert [rank["repairs"] for rank in found[way]] == [
        [[1, BAD, 0, [WEIGHT]]],
        [],
        [[1, BAD, 0, [WEIGHT]]],
    ]


@pytest.mark.parametrize(
    ("way", "step", "because"),
    [
        ("later, in parts", None, "a part of the state is looked at in each step, all of it in"),
        ("of one rank twice", AT + 1, f"rank {BAD} was repaired in step {AT} already"),
        ("of two ranks at once", AT, "fewer than 3 ranks hold it, or no majority"),
        ("right after a restore", AT, "not all of the state was compared in the step before"),
        ("what it was given", AT, f"rank {BAD} does not hold what it was given by rank 0"),
    ],
)
def test_where_a_repair_would_not_be_right_it_is_said_why_and_left_to_the_run(
    found: Found, way: str, step: int | None, because: str
) -> None:
    told = [rank["refused"] for rank in found[way]]
    assert told[2] == []
    assert told[0] == told[1]
    ((when, why),) = told[0]
    assert when == step or (step is None and 2 <= when < 2 + 4)
    assert because in why
    wanted = 1 if way == "of one rank twice" else 0
    assert [len(rank["repairs"]) for rank in found[way]] == [wanted, 0, wanted]


@pytest.mark.parametrize("which", ["one after the other", "whoever looks"])
def test_digests_that_want_one_rank_after_the_other_repaired_are_not_believed_any_more(
    found: Found, which: str
) -> None:
    way = f"digests of all, {which}"

    assert came_to(found, way) == came_to(found, "nothing"), "nothing was wrong, and nobody stopped"
    copied = [[step, rank, source] for step, rank, source, _ in found[way][0]["repairs"]]
    assert copied == [[AT, 1, 0], [AT + 1, 2, 0]]
    assert [tensors for *_, tensors in found[way][2]["repairs"]] == [[], []]
    off = [rank["off"] for rank in found[way]]
    assert off[2] == []
    assert off[0] == off[1]
    ((detector, why),) = off[0]
    assert detector == "digests"
    assert "ranks 0, 1, 2 had other digests of the same state than their twins" in why
    assert [rank["refused"] + rank["accused"] for rank in found[way]] == [[]] * REPLICAS


def test_what_goes_bad_when_the_batch_has_just_changed_is_repaired_since_it_was_compared_before(
    found: Found,
) -> None:
    way = "right after a ramp"

    assert came_to(found, way) == came_to(found, "nothing, with a ramp")
    assert found[way][0]["repairs"] == [[AT, BAD, 0, [WEIGHT]]]


def test_a_rank_that_dies_while_it_is_given_what_others_hold_leaves_behind_that_it_was(
    tmp_path: Path,
) -> None:
    found = train(tmp_path, "tp", 1, [DEADLY])

    first, last = found[DEADLY]
    assert first["begun"] == last["begun"] == [[AT, BAD, 0, [WEIGHT]]]
    assert (first["repairs"], first["refused"]) == ([], [])
    assert first["broken"]


@pytest.mark.parametrize("cut", ["dp_shard", "pp", "tp"])
def test_of_a_replica_of_several_ranks_the_one_is_repaired_that_went_bad(
    tmp_path: Path, cut: str
) -> None:
    update = "an update, and nothing is compared"
    found = train(tmp_path, cut, 2, ["nothing", "a weight", update])

    assert came_to(found, update) == came_to(found, "nothing")
    assert [len(rank["repairs"]) for rank in found[update]] == [0, 0, 1, 0, 0, 0]
    assert [rank["off"] for rank in found[update]] == [[]] * len(found[update])
    assert came_to(found, "a weight") == came_to(found, "nothing")
    told = [rank["repairs"] for rank in found["a weight"]]
    assert [len(each) for each in told] == [1, 0, 0, 0, 1, 0]
    ((step, rank, source, tensors),) = told[0]
    assert (step, rank, source, len(tensors)) == (AT, 2, 0, 1)
