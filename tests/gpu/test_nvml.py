"""A real card is read through NVIDIA's library: who it is, how it is, or why nobody can say."""

import sys

import pytest
import torch

from orchestrator.agent.nvml import QUESTIONS, Nvml

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: there is no GPU here"),
]


def test_every_card_says_who_it_is_and_of_every_gauge_what_it_is_or_why_not() -> None:
    pytest.importorskip("pynvml", reason="NOT TESTED: nvidia-ml-py is not installed")
    nvml = Nvml()
    boards, look = nvml.boards(), nvml.look()

    assert len(boards) >= torch.cuda.device_count()
    assert {reading.device for reading in look.readings} == {board.address for board in boards}
    assert not look.problem
    known = range(torch.cuda.device_count())
    seen = {f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in known}
    assert seen & {board.uuid for board in boards}, "the same cards as torch has"
    asked = {name for question in QUESTIONS for name in question.names}
    for board, reading in zip(boards, look.readings, strict=True):
        assert board.uuid.startswith("GPU-")
        assert board.model
        assert asked <= {*reading.values, *reading.missing}
        assert all(reading.missing.values()), "a gauge that is missing without a reason"
        assert reading.values["lost"] == 0
        assert 0 < reading.values["temperature_c"] < 120
        sys.stdout.write(f"{board} {dict(reading.values)} {dict(reading.missing)}\n")
