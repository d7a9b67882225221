"""A GPU that is well gets right what is known beforehand, in each of its units."""

import subprocess
import sys

import msgspec
import pytest
import torch

from orchestrator.protocol.preflight import Came
from orchestrator.worker.golden import GPU_CASES, SCALES
from trainer.preflight import compute

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: there is no GPU here"),
]


def test_every_product_has_the_digest_that_it_has_anywhere() -> None:
    came = compute("cuda", 0.0)

    assert came == Came(compared=len(GPU_CASES) * len(SCALES))


def test_the_program_tests_the_gpu_that_it_is_told_to() -> None:
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = [sys.executable, "-m", "trainer.preflight", uuid, "0"]

    done = subprocess.run(command, capture_output=True, timeout=150, check=True)

    came = msgspec.json.decode(done.stdout.rstrip().rpartition(b"\n")[2], type=Came)
    assert came == Came(compared=len(GPU_CASES) * len(SCALES))
