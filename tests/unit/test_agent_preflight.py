"""What a machine computes before it is let in again, and what is said of it."""

import numpy as np
import pytest

from orchestrator.agent import preflight as tested
from orchestrator.agent.preflight import CASES, SCALES, Case, digest, preflight, product, whole
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Serial

MACHINE = Device(Serial("m-1"), "machine", "stated")
GPU = Device(Serial("GPU-1"), "gpu", "driver")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_digests_are_those_of_whole_numbers_multiplied_exactly(case: Case) -> None:
    rows, inner, columns = case.shape
    left = whole(rows * inner, 1).reshape(rows, inner)
    right = whole(inner * columns, 2).reshape(inner, columns)
    exact = np.einsum("ij,jk->ik", left, right)

    assert np.abs(exact).max() < 2**24
    assert digest(exact.astype(case.name), 0) == case.golden
    for scale in SCALES:
        assert digest(product(case, scale), scale) == case.golden


def test_a_machine_that_computes_right_is_told_so_and_how_much_was_compared() -> None:
    came = preflight([MACHINE, GPU], ["m-1"], within_s=0.0)

    assert (came.serials, came.wrong, came.problem) == (("m-1",), "", "")
    assert came.compared == len(CASES) * len(SCALES)


def test_one_bit_of_one_answer_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def flawed(case: Case, scale: int) -> np.ndarray:
        found = product(case, scale)
        if scale == 20:
            found.flat[3] = np.nextafter(found.flat[3], np.inf, dtype=found.dtype)
        return found

    monkeypatch.setattr(tested, "product", flawed)

    came = preflight([MACHINE], ["m-1"], within_s=0.0)

    assert "scaled by 2**20" in came.wrong
    assert came.compared == SCALES.index(20) + 1


@pytest.mark.parametrize(
    ("serial", "problem"),
    [("GPU-1", "no test for GPUs"), ("m-2", "none of them is here")],
)
def test_what_can_not_be_tested_here_is_said(serial: str, problem: str) -> None:
    came = preflight([MACHINE, GPU], [Serial(serial)], within_s=0.0)

    assert came.compared == 0
    assert problem in came.problem


def test_the_numbers_are_whole_small_and_of_both_signs() -> None:
    found = whole(1000, 1)

    assert set(found.tolist()) == set(range(-15, 16))
    assert not np.array_equal(found, whole(1000, 2))
