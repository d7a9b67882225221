"""Whatever is let loose on a run, it ends with the bits of its undisturbed twin.

pytest tests/property/test_runs_end_with_the_same_bits.py --seeds 50
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.report import Report
from tests import drawn
from tests.runs import Job

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
STEPS = 40
RUN: dict[str, Any] = {
    "apiVersion": "holdfast.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {"name": "drawn"},
    "spec": {
        "nodes": {"count": 2, "ranksPerNode": 2, "spares": 1},
        "parallelism": {"dpReplicate": 2, "dpShard": 2},
        "trainer": {
            "model": {
                "dim": 64, "layers": 2, "heads": 4, "kvHeads": 2, "ffnDim": 128, "vocab": 1280,
            },
            "steps": STEPS,
            "seqLen": 64,
            "globalBatch": 4,
        },
        "checkpoint": {"everySteps": 10, "memoryEverySteps": 3},
        "detection": {"detectWithin": "3s"},
    },
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--seeds")))


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Report:
    job = Job(tmp_path_factory.mktemp("twin"), RUN)
    try:
        code, report = job.conduct("--quiet", timeout_s=150)
        assert code == 0, report.reason
        assert report.incidents == []
        return report
    finally:
        job.close()


@pytest.fixture
def disturbed(seed: int, tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path, RUN, drawn.plan(seed, steps=STEPS, nodes=2, ranks=4, spares=1))
    yield job
    job.close()


def test_a_drawn_fault_plan_changes_no_bit(seed: int, disturbed: Job, twin: Report) -> None:
    code, report = disturbed.conduct("--quiet", timeout_s=250)

    words = f"seed {seed}: {json.dumps(disturbed.faults)}; {report.reason}"
    assert code == 0, words
    assert report.final_step == STEPS
    assert report.final_state_digest == twin.final_state_digest, words
    assert report.losses == twin.losses, words
    assert report.losses_digest == twin.losses_digest
    assert (report.divergences, report.replicas_differ, report.losses_missing) == ([], [], []), (
        words
    )
    assert disturbed.leftovers() == []
