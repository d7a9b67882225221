"""A step that stands out is computed once more elsewhere: it was a device, or it is the data."""

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tests.programs import replayed
from tests.programs.doubted import AT, REPLICAS, STEPS, WAYS, WRONG
from tests.programs.forked import found_by

pytestmark = [pytest.mark.process, pytest.mark.timeout(150)]
Found = dict[str, list[dict[str, Any]]]


def train(folder: Path, cut: str, size: int, ways: Collection[str]) -> Found:
    """Return what each rank found, by rank, of some ways in which numbers may be wrong."""
    return found_by("doubted", folder, cut, size, ways, replicas=REPLICAS)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    ways = [way for way, how in WAYS.items() if "slips" not in how and "interleaved" not in way]
    return train(tmp_path_factory.mktemp("doubted"), "tp", 1, ways)


def losses(found: Found, way: str) -> list[str]:
    first, *others = (rank["losses"] for rank in found[way])
    assert all(other == first for other in others)
    text: list[str] = first
    return text


@pytest.mark.parametrize(
    "way",
    [
        "nothing stands out",
        "always replayed",
        "always replayed, and nothing digested",
        "deterministic",
    ],
)
def test_looking_changes_no_bit_and_says_nothing_of_steps_as_usual(found: Found, way: str) -> None:
    assert losses(found, way) == losses(found, "nothing looks")
    assert [(r["again"], r["diverged_"], r["off"]) for r in found[way]] == [([], [], [])] * REPLICAS


@pytest.mark.parametrize(
    ("way", "steps"),
    [
        ("always replayed", range(2, STEPS + 1)),
        ("always replayed, and nothing digested", range(2, STEPS + 1)),
        # Thrown away in one of them, and come out the same then.
        ("a little off once, and replayed", range(2, STEPS + 1)),
        # None is due but the first, which is a test of itself.
        ("nothing stands out", [2]),
        ("other bits each time", []),
        ("another processor", []),
        ("not known to repeat", range(2, STEPS + 1)),
        ("not known to repeat, a little off once", range(2, STEPS + 1)),
        ("not known to repeat, other kernels on a rank", []),
        ("not known to repeat, other kernels later on", range(2, AT)),
        ("not known to repeat, others off each time", range(2, 7)),
        ("not known to repeat, other bits each time", []),
        ("not known to repeat, and not asked for", []),
    ],
)
def test_ranks_say_in_which_steps_they_came_to_the_same_as_others(
    found: Found, way: str, steps: Collection[int]
) -> None:
    assert [rank["replayed"] for rank in found[way]] == [list(steps)] * REPLICAS


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


def test_a_bit_that_is_rounded_away_before_any_gradient_is_found_and_said_where(
    found: Found,
) -> None:
    way = "a low bit once, and replayed"

    assert losses(found, way) == losses(found, "nothing looks")
    told = [rank["diverged_"] for rank in found[way]]
    assert [len(each) for each in told] == [1, 0, 1]
    ((step, _, ranks, proven, evidence),) = told[0]
    assert (step, ranks, proven) == (AT - 1, [WRONG], True)
    where = "what came out of layers.0.attention.wo, forward"
    assert evidence.endswith(f"rank {WRONG} differs from rank 0 first in {where}")


def test_a_rank_that_was_handed_other_samples_is_named_before_they_move_anything(
    found: Found,
) -> None:
    way = "other tokens once"

    assert losses(found, way) == losses(found, "nothing looks")
    told = [rank["diverged_"] for rank in found[way]]
    assert [len(each) for each in told] == [1, 0, 1]
    ((step, since, ranks, proven, evidence),) = told[0]
    assert (step, since, ranks, proven) == (AT - 1, AT - 1, [WRONG], True)
    assert "micro-batches came out otherwise when read once more (of rank 1 by" in evidence


def test_samples_that_stay_other_ones_are_never_trained_on_and_are_the_data_s_fault(
    found: Found,
) -> None:
    way = "other tokens on its disk"

    assert losses(found, way) == losses(found, "nothing looks")[: AT - 1]
    assert [rank["waits"] for rank in found[way]] == [1] * REPLICAS
    told = [rank["diverged_"][0] for rank in found[way] if rank["diverged_"]]
    assert [each[2:4] for each in told] == [[[WRONG], True]] * 2
    for *_, evidence, verdict in told:
        assert verdict == "data"
        assert evidence.endswith("they read the same there each time, so it is the data")


def test_a_rank_that_can_not_read_the_samples_of_others_says_so_and_all_go_on(
    found: Found,
) -> None:
    way = "tokens that can not be read again"

    assert losses(found, way) == losses(found, "nothing looks")
    off = [rank["off"] for rank in found[way]]
    assert off == [[], [["readings", "OSError: no data"]], []]
    assert not any(rank["diverged_"] for rank in found[way])


@pytest.mark.parametrize("way", ["a wrong sum once", "a wrong sum once, deterministic"])
def test_a_sum_that_is_not_what_ranks_put_in_moves_nothing_and_is_noted(
    found: Found, way: str
) -> None:
    assert losses(found, way) == losses(found, "nothing looks")
    assert not any(rank["diverged_"] or rank["off"] for rank in found[way])
    *told, silent = (rank["thrown"] for rank in found[way])
    assert silent == []
    for thrown in told:
        ((step, because),) = thrown
        assert step == AT
        assert "adds up to" in because


def test_sums_that_are_off_by_the_same_again_end_what_looks_at_them_and_not_the_run(
    found: Found,
) -> None:
    way = "sums that stay wrong"

    assert losses(found, way) == losses(found, f"{way}, and nothing looks")
    assert losses(found, way) != losses(found, "nothing looks")
    assert not any(rank["diverged_"] or rank["waits"] for rank in found[way])
    assert [len(rank["thrown"]) for rank in found[way]] == [1, 1, 0]
    *told, silent = (rank["off"] for rank in found[way])
    assert silent == [], "two say what all know"
    for off in told:
        ((detector, reason),) = off
        assert detector == "sums"
        assert reason.startswith(f"in step {AT}, also when it is computed again, the gradient adds")


@pytest.mark.parametrize("way", ["sums that are wrong in other ways", "sums that stay far off"])
def test_a_sum_that_no_rounding_explains_is_never_learned_from_and_names_nobody(
    found: Found, way: str
) -> None:

    assert losses(found, way) == losses(found, "nothing looks")[: AT - 1]
    assert [rank["waits"] for rank in found[way]] == [1] * REPLICAS
    told = [rank["diverged_"] for rank in found[way]]
    assert [len(each) for each in told] == [1, 1, 0]
    ((step, _, ranks, proven, evidence),) = told[0]
    assert (step, ranks, proven) == (AT - 1, [], False)
    assert evidence.startswith(f"in step {AT}, at last in the 4th attempt, the gradient adds up")


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


SLIPS = {
    "the first stage, forward": 0,
    "the last stage, forward": 1,
    "the first stage, back": 0,
    "the last stage, back": 1,
    "interleaved, the last stage, back": 1,
    "deterministic, the first stage, forward": 0,
    "a low bit once, and replayed": 1,
}
BLIND = ("nothing looks", "interleaved, and nothing looks", "deterministic, and nothing looks")


def blind(way: str) -> str:
    """Return the way that is like this one, but that nothing looks, and nothing is wrong."""
    return next((each for each in BLIND[1:] if each.split(",")[0] in way), BLIND[0])


@pytest.fixture(scope="module")
def piped(tmp_path_factory: pytest.TempPathFactory) -> Found:
    ways = ("always replayed", "interleaved", "other tokens once")
    return train(tmp_path_factory.mktemp("piped"), "pp", 2, (*BLIND, *ways, *SLIPS))


@pytest.mark.parametrize("way", ["always replayed", "interleaved"])
def test_replays_of_pipelines_change_no_bit_and_accuse_nobody(piped: Found, way: str) -> None:
    assert losses(piped, way) == losses(piped, blind(way))
    assert not any(rank["diverged_"] or rank["off"] for rank in piped[way])


@pytest.mark.parametrize(("way", "wrong"), SLIPS.items())
def test_of_a_pipeline_the_stage_that_was_wrong_is_named_and_its_step_moves_nothing(
    piped: Found, way: str, wrong: int
) -> None:
    assert losses(piped, way) == losses(piped, blind(way))
    told = [rank["diverged_"] for rank in piped[way] if rank["diverged_"]]
    assert len(told) == 2
    ((step, _, ranks, proven, evidence),) = told[0]
    assert (step, ranks, proven) == (AT - 1, [wrong], True)
    assert f"rank {wrong} has " in evidence


def test_a_stage_that_was_handed_other_samples_is_named_like_any_rank(piped: Found) -> None:
    way = "other tokens once"

    assert losses(piped, way) == losses(piped, "nothing looks")
    told = [rank["diverged_"] for rank in piped[way] if rank["diverged_"]]
    assert [each[0][2:4] for each in told] == [[[WRONG], True]] * 2


def test_stages_that_are_sharded_replay_and_the_wrong_one_is_named(tmp_path: Path) -> None:
    quiet = ("nothing looks", "always replayed")
    way = "the first stage, forward"

    found = train(tmp_path, "pp,dp_shard", 2, [*quiet, way])

    for each in ("always replayed", way):
        assert losses(found, each) == losses(found, "nothing looks"), each
    assert not any(rank["diverged_"] or rank["off"] for rank in found["always replayed"])
    told = [rank["diverged_"] for rank in found[way] if rank["diverged_"]]
    assert [each[0][2:4] for each in told] == [[[0], True]] * 2


def test_what_comes_out_the_same_everywhere_is_the_data_and_the_run_goes_on(found: Found) -> None:
    blind = losses(found, "huge always, and nothing looks")

    assert losses(found, "huge always") == blind != losses(found, "nothing looks")
    for rank in found["huge always"]:
        assert (rank["again"], rank["diverged_"], rank["off"]) == ([AT], [], [])


def test_what_stands_out_while_no_rank_looks_at_itself_is_computed_again_and_looked_at_then(
    found: Found,
) -> None:
    once, always = "huge once, between turns", "huge always, between turns"

    assert losses(found, once) == losses(found, "nothing looks")
    assert losses(found, always) == losses(found, "huge always, and nothing looks")
    assert [rank["again"] for rank in found[once]] == [[]] * REPLICAS
    assert [rank["again"] for rank in found[always]] == [[AT]] * REPLICAS
    assert not any(
        rank["diverged_"] or rank["off"] for way in (once, always) for rank in found[way]
    )
    assert not any(rank["thrown"] for rank in found[always])
    *told, silent = (rank["thrown"] for rank in found[once])
    assert silent == []
    for thrown in told:
        ((step, because),) = thrown
        assert step == AT
        assert because.startswith("the loss is ")
        assert because.endswith(" times as large as usual, and not when it was computed again")


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
        assert all(reason.startswith("on 3 of 3 ranks the same") for _, reason in off)


def test_where_each_rank_comes_to_bits_of_its_own_nobody_is_accused_and_nothing_is_compared(
    found: Found,
) -> None:
    way = "other bits on each rank"

    assert losses(found, way) == losses(found, "nothing looks")
    assert not any(rank["diverged_"] or rank["waits"] for rank in found[way])
    *told, silent = (rank["off"] for rank in found[way])
    assert silent == [], "two say what all know"
    for off in told:
        assert [detector for detector, _ in off] == ["replays", "outliers"]
        assert all("no majority of ranks agrees" in reason for _, reason in off)


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


def test_where_bits_are_not_known_to_repeat_what_differs_once_is_noted_and_accuses_nobody(
    found: Found,
) -> None:
    way = "not known to repeat, a little off once"

    assert losses(found, way) == losses(found, "nothing looks")
    assert not any(rank["diverged_"] or rank["off"] for rank in found[way])
    *told, silent = (rank["thrown"] for rank in found[way])
    assert silent == []
    for thrown in told:
        ((step, because),) = thrown
        assert step == AT
        assert f"rank {WRONG} has" in because


def test_there_a_rank_is_named_once_it_differed_from_itself_again_and_again_and_nobody_else_did(
    found: Found,
) -> None:
    way = "not known to repeat, a little off again and again"

    assert losses(found, way) == losses(found, "nothing looks")
    assert [step for step, _ in found[way][0]["thrown"]] == [3, 5]
    told = [rank["diverged_"] for rank in found[way]]
    assert [len(each) for each in told] == [1, 0, 1]
    ((step, since, ranks, proven, evidence),) = told[0]
    assert (step, ranks, proven) == (6, [WRONG], True)
    assert since < 3, "the device was wrong in step 3 already"
    assert evidence.endswith("; so it was 3 times, and never another's")


@pytest.mark.parametrize(
    ("way", "thrown", "reason"),
    [
        (
            "not known to repeat, other kernels on a rank",
            [],
            "2 of 3 micro-batches come out otherwise in another process (of rank 1 by 0, 2 by 1)",
        ),
        (
            "not known to repeat, other kernels later on",
            [AT, AT],
            "micro-batches came out otherwise 3 times, the same each time, of which a",
        ),
        (
            "not known to repeat, others off each time",
            [3, 5],
            "micro-batches came out otherwise 3 times, now and then, of which a device",
        ),
        ("not known to repeat, other bits each time", [], "on 3 of 3 ranks the same micro-batch"),
    ],
)
def test_what_devices_are_not_known_to_cause_ends_replays_and_accuses_nobody(
    found: Found, way: str, thrown: list[int], reason: str
) -> None:
    assert not any(rank["diverged_"] or rank["waits"] for rank in found[way])
    assert len(found[way][0]["losses"]) == STEPS
    assert [step for step, _ in found[way][0]["thrown"]] == thrown
    *told, silent = (rank["off"] for rank in found[way])
    assert silent == [], "two say what all know"
    for off in told:
        ((detector, why),) = off
        assert detector == "replays"
        assert why.startswith(reason)


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


def test_what_replicas_on_gpus_are_tried_with_works_on_cpus(tmp_path: Path) -> None:
    """tests/gpu/test_replays.py does the same where there are GPUs."""
    command = [sys.executable, "-m", "tests.programs.replayed", tmp_path, "cpu", "2"]
    subprocess.run(command, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"}, timeout=140, check=True)

    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["replayed"] for rank in found] == [list(range(2, replayed.STEPS + 1))] * 2
    assert not any(rank["diverged_"] or rank["off"] for rank in found)
