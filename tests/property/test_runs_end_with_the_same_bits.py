"""Whatever is let loose on a run, it ends with the bits of its undisturbed twin.

pytest tests/property/test_runs_end_with_the_same_bits.py --seeds 50
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.report import Report
from tests import drawn
from tests.runs import Job
from tests.tiny import RUN, STEPS, assert_same_bits, undisturbed

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--seeds")))


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return undisturbed(tmp_path_factory.mktemp("twin"))


@pytest.fixture
def disturbed(seed: int, tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path, RUN, drawn.plan(seed, steps=STEPS, nodes=2, ranks=4, spares=1))
    yield job
    job.close()


def test_a_drawn_fault_plan_changes_no_bit(seed: int, disturbed: Job, twin: Report) -> None:
    code, report = disturbed.conduct("--quiet", timeout_s=250)

    words = f"seed {seed}: {json.dumps(disturbed.faults)}; {report.reason}"
    assert code == 0, words
    assert_same_bits(report, twin, words)
    assert disturbed.leftovers() == []
