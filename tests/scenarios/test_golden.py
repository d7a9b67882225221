"""Golden scenarios: a story of what breaks, and every decision about it, reviewed as a diff.

Each file has prose, what is let loose on the small run, and below a line of dashes what happens.
`pytest tests/scenarios/test_golden.py --rewrite` writes that anew.
"""

from pathlib import Path

import pytest
import yaml

from orchestrator.simulation import story
from tests.runs import steps_job
from tests.simulated import SimulatedJob

FOLDER = Path(__file__).parent / "golden"
STORIES = sorted(path.stem for path in FOLDER.glob("*.txt"))
DASHES = "-" * 40


def job_of(given: str) -> SimulatedJob:
    """Return the run of a scenario, from what is written above its line."""
    described = yaml.safe_load(given)
    return SimulatedJob(
        steps_job(**described.get("run", {})),
        described.get("faults", []),
        operations=described.get("operations", []),
        devices=described.get("devices", {}),
        failing=described.get("failing", []),
    )


def told(given: str) -> str:
    """Return what happens in a scenario, from what is written above its line."""
    job = job_of(given)
    _, report = job.conduct()
    incidents = [f"{i.id} {i.kind} ({i.cause}): {i.rung}" for i in report.incidents]
    ended = f"{report.state}: {report.reason}"
    return "\n".join([*story.lines(job.journal), "", *incidents, ended, ""])


def test_there_are_stories() -> None:
    assert len(STORIES) >= 10


@pytest.mark.parametrize("name", STORIES)
def test_what_is_decided_is_what_was_reviewed(name: str, request: pytest.FixtureRequest) -> None:
    path = FOLDER / f"{name}.txt"
    given, dashes, reviewed = path.read_text(encoding="utf-8").partition(f"{DASHES}\n")

    happened = told(given)

    if request.config.getoption("--rewrite"):
        path.write_text(f"{given}{DASHES}\n{happened}", encoding="utf-8")
    else:
        assert dashes, f"no line of dashes; write it with --rewrite: {path}"
        assert happened == reviewed
