"""Two processes on a GPU compute the same bits; if not, it is said what differs first."""

import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

from trainer.kernels import VARIABLE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: there is no GPU here"),
    pytest.mark.timeout(600),
]
STEPS = 3


def lines(kernels: Path) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-m", "tests.programs.digested", "cuda", str(kernels), str(STEPS)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert any(line.startswith(f"step {STEPS} weight ") for line in told)
    return told


@pytest.mark.parametrize("again", ["one", "two"], ids=["finds kernels", "compiles its own"])
def test_another_process_comes_to_the_same_bits_at_every_layer(again: str, tmp_path: Path) -> None:
    first = lines(tmp_path / "one" / "kernels")
    second = lines(tmp_path / again / "kernels")

    differ = [pair for pair in zip_longest(first, second) if pair[0] != pair[1]]
    assert not differ, f"{len(differ)} of {len(first)} differ, the first: {differ[0]}"
