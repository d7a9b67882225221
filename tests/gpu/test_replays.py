"""Ranks on GPUs that compute each other's micro-batches come to the same bits, or say otherwise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.programs.replayed import STEPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason="NOT TESTED: there are no two GPUs here"
    ),
    pytest.mark.timeout(600),
]


def test_replays_over_nccl_agree_or_are_switched_off_with_the_reason_and_accuse_nobody(
    tmp_path: Path,
) -> None:
    replicas = min(torch.cuda.device_count(), 4)
    command = [sys.executable, "-m", "tests.programs.replayed", tmp_path, "cuda", str(replicas)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)

    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(replicas)]
    sys.stdout.write(f"{found}\n")
    assert not any(rank["diverged_"] for rank in found)
    if off := found[0]["off"]:
        ((detector, reason),) = off
        assert (detector, "shows nothing" in reason) == ("replays", True)
    else:
        assert [rank["replayed"] for rank in found] == [list(range(2, STEPS + 1))] * replicas
