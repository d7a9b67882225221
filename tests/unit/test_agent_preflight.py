"""What a machine computes before it is let in again, and what is said of it."""

import sys

import numpy as np
import pytest

from orchestrator.agent import preflight as tested
from orchestrator.agent.preflight import preflight, product
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Serial
from orchestrator.worker.golden import CASES, GPU_CASES, SCALES, Case, digest, whole

MACHINE = Device(Serial("m-1"), "machine", "stated")
GPU = Device(Serial("GPU-1"), "gpu", "driver")


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_the_digests_are_those_of_whole_numbers_multiplied_exactly(case: Case) -> None:
    left, right = case.factors()
    exact = np.einsum("ij,jk->ik", left, right)

    small = case.name == "bfloat16"
    assert np.abs(exact).max() <= (2**8 if small else 2**24)
    assert digest(exact.astype("float32" if small else case.name), 0) == case.golden


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_processor_comes_to_them_at_every_scale(case: Case) -> None:
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


def test_a_test_that_raises_is_answered_with_what_it_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_case: Case, _scale: int) -> np.ndarray:
        raise MemoryError("no room")

    monkeypatch.setattr(tested, "product", broken)

    came = preflight([MACHINE], [Serial("m-1")], within_s=0.0)

    assert (came.serials, came.wrong) == (("m-1",), "")
    assert came.problem == "machine m-1: its test raised MemoryError: no room"


def test_what_is_not_here_is_not_tested() -> None:
    came = preflight([MACHINE, GPU], [Serial("m-2")], within_s=0.0)

    assert (came.compared, came.problem) == (0, "none of them is here")


def says(text: str) -> tuple[str, ...]:
    """A program that says something at its end, whatever it is asked."""
    return sys.executable, "-c", f"print({text!r})"


def test_a_gpu_that_gets_one_wrong_is_the_only_one_that_is_told_of() -> None:
    program = says('a word first\n{"compared": 3, "wrong": "a product"}')

    came = preflight(
        [GPU, MACHINE], [Serial("m-1"), Serial("GPU-1")], within_s=0.0, program=program
    )

    assert (came.serials, came.wrong, came.problem) == (("GPU-1",), "a product", "")
    assert came.compared == len(CASES) * len(SCALES) + 3


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        (says('{"problem": "torch sees no such GPU"}'), "gpu GPU-1: torch sees no such GPU"),
        (says("Segmentation fault"), "its test ended without an answer: it said nothing"),
        ((sys.executable, "-c", "raise SystemExit('no torch')"), "without an answer: no torch"),
        (("/nowhere/python",), "its test can not be started: "),
        (
            (
                sys.executable,
                "-c",
                r"""import os; os.write(1, b'{"wrong": "\xff"}'); raise SystemExit('bent')""",
            ),
            "without an answer: bent",
        ),
    ],
)
def test_a_gpu_whose_test_comes_to_nothing_is_neither_right_nor_wrong(
    program: tuple[str, ...], problem: str
) -> None:
    came = preflight([GPU], [Serial("GPU-1")], within_s=0.0, program=program)

    assert (came.serials, came.compared, came.wrong) == (("GPU-1",), 0, "")
    assert problem in came.problem


def test_the_program_computes_where_it_is_told_to() -> None:
    came = preflight([Device(Serial("cpu"), "gpu", "driver")], [Serial("cpu")], within_s=0.0)

    assert (came.compared, came.wrong, came.problem) == (len(GPU_CASES) * len(SCALES), "", "")


def test_the_numbers_are_whole_small_and_of_both_signs() -> None:
    found = whole(1000, 1)

    assert set(found.tolist()) == set(range(-15, 16))
    assert not np.array_equal(found, whole(1000, 2))
