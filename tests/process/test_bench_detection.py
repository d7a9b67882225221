"""The benchmark of detection measures what it says; how much it is is not asked here."""

import json
import subprocess
import sys

import pytest

from tests.runs import REPOSITORY

UNITS = ("", "_processor")
SHORT = ("--stretch", "2", "--warm", "3", "--whole")


@pytest.mark.process
@pytest.mark.timeout(320)
def test_the_benchmark_of_detection_gives_an_interval_of_each_cost_and_their_sum() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.detection", "--pairs", "2", "--json", *SHORT],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=REPOSITORY,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    parts = ("overhead", "always", "replay")
    for name in (f"{of}{unit}" for of in parts for unit in UNITS):
        assert -1 < found[name]["low"] <= found[name]["median"] <= found[name]["high"]
    assert 50 <= found["replay_every_steps"] <= 200
    replays = found["replay"]["median"] / found["replay_every_steps"]
    expected = found["always"]["median"] + replays
    assert found["overhead"]["median"] == pytest.approx(expected)
    assert min(found["digest_gb_s"], found["copy_gb_s"]) > 0
