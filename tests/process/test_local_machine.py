"""What a machine of the local world does about agents that are killed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import Job, steps_job

pytestmark = pytest.mark.process


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    options = steps_job()["spec"]["trainer"]["options"] | {"spawn": True}
    fault = {"when": {"step": 22}, "fault": "kill-agent", "node": "node-0"}
    one = Job(tmp_path / "job", steps_job(trainer__options=options), [fault])
    yield one
    one.close()


def test_what_ranks_of_a_killed_agent_had_started_ends_with_the_run_too(job: Job) -> None:
    code, report = job.conduct()

    assert code == 0, report.reason
    assert [incident.kind for incident in report.incidents] == ["node-lost"]
    # Each rank had started one that naps for a minute, and nobody but the agent to reap it.
    assert job.output().count("Traceback") == 0
    assert job.leftovers() == []
