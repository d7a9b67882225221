"""A step that stands out is computed once more elsewhere: it was a device, or it is the data."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.programs.doubted import AT, REPLICAS, WAYS, WRONG

pytestmark = [pytest.mark.process, pytest.mark.timeout(150)]
Found = dict[str, list[dict[str, Any]]]


def train(folder: Path, cut: str, size: int, ways: Iterable[str]) -> Found:
    """Return what each rank found, by rank, of some ways in which numbers may be wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.doubted", str(folder), cut, str(size), *ways],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [folder / f"{rank}.json" for rank in range(REPLICAS * size)]
    ranks = [json.loads(file.read_bytes()) for file in files]
    return {way: [rank[way] for rank in ranks] for way in ways}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return train(tmp_path_factory.mktemp("doubted"), "tp", 1, WAYS)


def losses(found: Found, way: str) -> list[str]:
    first, *others = (rank["losses"] for rank in found[way])
    assert all(other == first for other in others)
    text: list[str] = first
    return text


@pytest.mark.parametrize("way", ["nothing stands out", "always replayed", "deterministic"])
def test_looking_changes_no_bit_and_says_nothing_of_steps_as_usual(found: Found, way: str) -> None:
    assert losses(found, way) == losses(found, "nothing looks")
    assert [(r["again"], r["diverged_"], r["off"]) for r in found[way]] == [([], [], [])] * REPLICAS


@pytest.mark.parametrize(
    ("way", "at"), [("huge once", AT), ("no number once", 3), ("huge once, deterministic", AT)]
)
def test_a_rank_that_was_wrong_once_is_named_and_its_step_moves_nothing(
    found: Found, way: str, at: int
) -> None:
    assert losses(found, way) == losses(found, "nothing looks")
    told = [rank["diverged_"] for rank in found[way]]
    assert told[WRONG] == []
    ((step, _, ranks, proven, evidence),) = told[0]
    assert told[2] == told[0]
    assert (step, ranks, proven) == (at - 1, [WRONG], True)
    assert f"in step {at}, rank {WRONG}'s loss or gradient of a weight is" in evidence


@pytest.mark.parametrize("cut", ["tp", "cp"])
def test_ranks_that_share_micro_batches_replay_as_a_group_and_the_wrong_one_is_named(
    tmp_path: Path, cut: str
) -> None:
    quiet = ("nothing looks", "always replayed")
    wrong = {"huge once": AT, "a little off once, and replayed": AT}

    found = train(tmp_path, cut, 2, [*quiet, *wrong])

    for way in (*quiet, *wrong):
        assert losses(found, way) == losses(found, "nothing looks"), way
    assert not any(rank["diverged_"] or rank["off"] for way in quiet for rank in found[way])
    for way, at in wrong.items():
        told = [rank["diverged_"] for rank in found[way] if rank["diverged_"]]
        assert len(told) == 2
        ((step, _, ranks, proven, evidence),) = told[0]
        assert (step, ranks, proven) == (at - 1, [0, WRONG], True), way
        assert evidence.endswith("ranks 0 to 1 compute together, and one may mislead the others")


def test_what_comes_out_the_same_everywhere_is_the_data_and_the_run_goes_on(found: Found) -> None:
    blind = losses(found, "huge always, and nothing looks")

    assert losses(found, "huge always") == blind != losses(found, "nothing looks")
    for rank in found["huge always"]:
        assert (rank["again"], rank["diverged_"], rank["off"]) == ([AT], [], [])


def test_a_rank_that_can_not_look_says_so_and_all_go_on_without(found: Found) -> None:
    assert losses(found, "blind") == losses(found, "nothing looks")
    off = [rank["off"] for rank in found["blind"]]
    assert off == [[], [["outliers", "RuntimeError: no norm today"]], []]


def test_where_a_micro_batch_differs_from_itself_at_the_start_nothing_is_compared(
    found: Found,
) -> None:
    assert losses(found, "other bits each time") == losses(found, "nothing looks")
    for rank in found["other bits each time"]:
        assert (rank["again"], rank["diverged_"]) == ([], [])
    *told, silent = (rank["off"] for rank in found["other bits each time"])
    assert silent == [], "two say what all know"
    for off in told:
        assert [detector for detector, _ in off] == ["replays", "outliers"]
        assert all(reason.startswith("3 of 3 ranks get another") for _, reason in off)


@pytest.mark.parametrize(
    "way",
    [
        "raises when computed once more",
        "raises on the way back",
        "raises on the way back, deterministic",
    ],
)
def test_what_raises_in_a_pass_that_is_done_once_more_ends_the_detector_and_changes_no_step(
    found: Found, way: str
) -> None:
    kind = ", deterministic" if "deterministic" in way else ""
    blind = losses(found, f"huge once{kind}, and nothing looks")

    assert losses(found, way) == blind != losses(found, "nothing looks")
    off = [rank["off"] for rank in found[way]]
    assert off == [[["outliers", "RuntimeError: no second time"]], [], []]
    assert not any(rank["diverged_"] for rank in found[way])


def test_a_step_that_is_thrown_away_is_read_anew_and_the_next_ones_are_read_ahead(
    found: Found,
) -> None:
    way = "huge once, read ahead"

    assert losses(found, way) == losses(found, "nothing looks")
    assert [len(rank["diverged_"]) for rank in found[way]] == [1, 0, 1]


def test_ranks_on_processors_of_two_kinds_are_not_compared(found: Found) -> None:
    way = "another processor"

    assert losses(found, way) == losses(found, "nothing looks")
    assert not any(rank["diverged_"] or rank["again"] for rank in found[way])
    *told, silent = (rank["off"] for rank in found[way])
    assert silent == []
    for off in told:
        assert [detector for detector, _ in off] == ["replays", "outliers"]
        assert all(reason.startswith("ranks compute on 2 kinds of processors") for _, reason in off)


def test_a_rank_that_can_not_be_tested_ends_replays_and_not_what_looks_at_outliers(
    found: Found,
) -> None:
    way = "blind when tested"

    assert [rank["off"] for rank in found[way]] == [[], [["replays", "OSError: no digest"]], []]
    assert [len(rank["diverged_"]) for rank in found[way]] == [1, 0, 1]
    assert losses(found, way) == losses(found, "nothing looks")


@pytest.mark.parametrize(
    ("way", "at"), [("always wrong from the test on", 2), ("always wrong at first", AT)]
)
def test_a_step_that_never_comes_out_well_is_never_taken(found: Found, way: str, at: int) -> None:
    """Whoever says so in it, and whoever finds another part of it sound."""
    assert losses(found, way) == losses(found, "nothing looks")[: at - 1]
    assert [rank["waits"] for rank in found[way]] == [1] * REPLICAS
    told = [rank["diverged_"] for rank in found[way]]
    assert [len(each) for each in told] == [1, 0, 1]
    ((step, _, ranks, proven, _),) = told[0]
    assert (step, ranks, proven) == (at - 1, [WRONG], True)
