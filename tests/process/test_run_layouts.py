"""The example in three dimensions loses ranks of two stages, and ends with the bits of its twin."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.core.report import Report
from tests import tiny
from tests.runs import REPOSITORY, Job

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
STEPS = 7


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """The example, shorter and without a spare."""
    found: dict[str, Any] = yaml.safe_load(
        (REPOSITORY / "deploy/examples/llama3-3d.yaml").read_text()
    )
    found["spec"]["nodes"]["spares"] = 0
    found["spec"]["trainer"]["steps"] = STEPS
    found["spec"]["checkpoint"] = {"everySteps": 4, "memoryEverySteps": 1}
    return found


def test_ranks_of_two_stages_that_die_and_freeze_change_no_bit(
    run: dict[str, Any], tmp_path: Path
) -> None:
    faults = [
        {"when": {"step": 2}, "fault": "kill-rank", "rank": 5},
        {"when": {"step": 4}, "fault": "freeze-rank", "rank": 2},
    ]
    twin = tiny.undisturbed(tmp_path / "twin", run)
    job = Job(tmp_path / "disturbed", run, faults)
    try:
        code, report = job.conduct("--quiet", timeout_s=180)
    finally:
        job.close()

    assert code == 0, report.reason
    _assert_same_bits(report, twin)
    assert [incident.kind for incident in report.incidents] == ["crash", "hang"]
    assert STEPS in {found.step for found in report.checkpoints}
    assert job.leftovers() == []


def _assert_same_bits(report: Report, twin: Report) -> None:
    assert report.final_step == STEPS
    assert report.final_state_digest == twin.final_state_digest
    assert report.losses == twin.losses
    assert (report.divergences, report.replicas_differ, report.losses_missing) == ([], [], [])
