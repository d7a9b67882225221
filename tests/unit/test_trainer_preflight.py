"""What a program says of a device that it has compute what is known beforehand."""

import msgspec
import pytest
import torch

from orchestrator.protocol.preflight import Came
from orchestrator.worker.golden import GPU_CASES, SCALES
from trainer import preflight


def test_a_device_that_is_well_gets_all_of_it_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.main(["cpu", "0"]) == 0

    came = msgspec.json.decode(capsys.readouterr().out, type=Came)
    assert came == Came(compared=len(GPU_CASES) * len(SCALES))


def test_one_bit_of_one_product_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.Tensor.__matmul__

    def flawed(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        found = right(left, other)
        if found.dtype is torch.bfloat16 and found.shape[0] == 1:
            found[0, 3] = torch.nextafter(found[0, 3], torch.tensor(torch.inf).bfloat16())
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", flawed)

    came = preflight.compute("cpu", 0.0)

    assert came.compared == (len(GPU_CASES) - 1) * len(SCALES) + 1
    assert came.wrong.startswith("a product of (1, 256, 257) in bfloat16, scaled by 2**-40")


def test_a_device_that_fails_while_it_computes_is_a_problem_and_not_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: the GPU is lost\nand more of it")

    monkeypatch.setattr(torch.Tensor, "__matmul__", lost)

    assert preflight.main(["cpu", "0"]) == 0
    came = msgspec.json.decode(capsys.readouterr().out, type=Came)
    assert came == Came(problem="it can not compute: CUDA error: the GPU is lost")


def test_a_gpu_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert preflight.compute("cuda", 0.0) == Came(problem="torch sees no such GPU")


@pytest.mark.parametrize("arguments", [[], ["cpu"], ["cpu", "soon"]])
def test_what_is_no_command_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert preflight.main(arguments) == 2
    assert "expected UUID SECONDS" in capsys.readouterr().err
