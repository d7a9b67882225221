"""Ranks of real process groups save and load through `torch.distributed.checkpoint`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.process
def test_a_state_of_fully_shard_is_loaded_by_any_number_of_ranks(tmp_path: Path) -> None:
    """Saved by 1, 2 and 4 ranks, with collectives and without, and beside training."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.programs.dcp_ranks", str(tmp_path)]

    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=170, check=False
    )

    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.process
def test_the_example_of_the_documentation_runs_as_it_stands(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/dcp.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (line,) = re.findall(r'URI = "(.*?)"', example)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = os.environ | alone | {"GLOO_SOCKET_IFNAME": "lo"}

    done = subprocess.run(
        [sys.executable, "-c", example.replace(line, str(tmp_path / "store"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    assert len(list((tmp_path / "store/commits").iterdir())) == 1
