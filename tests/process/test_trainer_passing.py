"""Of ranks with the same shard one reads what is cut anew, and passes it on to the others."""

from pathlib import Path
from typing import Any

import pytest

from tests.programs.forked import found_by
from tests.programs.passed import REPLICAS, WAYS

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder: Path = tmp_path_factory.mktemp("passed")
    return found_by("passed", folder, "dp_shard", 2, WAYS, replicas=REPLICAS)


def test_each_shard_is_read_by_one_rank_of_a_node_of_its_own_and_all_hold_it_to_the_bit(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    ranks = found["well"]

    assert [rank["reads"] for rank in ranks] == [True, False, False, True]
    assert [rank["asked"] > 0 for rank in ranks] == [True, False, False, True]
    assert all(rank["right"] for rank in ranks)


def test_what_comes_damaged_is_read_after_all(found: dict[str, list[dict[str, Any]]]) -> None:
    ranks = found["damaged on its way"]

    assert [rank["asked"] > 0 for rank in ranks] == [True, False, True, True]
    assert all(rank["right"] for rank in ranks)


def test_who_waits_for_a_reader_says_that_it_is_alive(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    waits = [rank for rank in found["read slowly"] if not rank["reads"]]

    assert all(rank["right"] and rank["alive"] > 3 for rank in waits)
    assert [rank["asked"] for rank in waits] == [0, 0]
