"""A rank that is slower than its peers, on real processes: whose fault it is, and what is done."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.report import IncidentReport, Report
from tests.runs import Job, steps_job

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]
STEPS = 140


def job(root: Path, faults: list[dict[str, Any]], **options: Any) -> Job:
    """Return a run of three ranks that hash for twice as long as a slow one is stopped for."""
    lockstep = root / "lockstep"
    lockstep.mkdir(parents=True)
    run = steps_job(
        nodes={"count": 3, "ranksPerNode": 1, "spares": 1},
        parallelism={"dpReplicate": 3, "dpShard": 1},
        trainer__steps=STEPS,
        trainer__options={
            "steps": STEPS,
            "step_s": 0.005,
            "save_every": 5,
            "durable_every": 70,
            "busy": 50,
            "lockstep": str(lockstep),
            **options,
        },
        detection={"detectWithin": "2s"},
    )
    return Job(root, run, faults)


def judged(
    root: Path, cause: str, faults: list[dict[str, Any]], **options: Any
) -> tuple[IncidentReport, Report]:
    """Return the incident of rank 1 that has a cause, and its run.

    Three ranks, maybe on two cores: a core that others use is a slow one, and may be called that,
    or cover rank 1. So no test runs beside it (`make test`), and there are three tries.
    """
    seen = []
    for attempt in range(3):
        one = job(root / str(attempt), faults, **options)
        _, report = one.conduct("--quiet", timeout_s=90)
        for found in report.incidents:
            seen.append((found.kind, found.cause, found.suspects))
            if seen[-1] == ("straggler", cause, ["rank 1", "node-1"]):
                return found, report
    raise AssertionError(seen)


def test_a_rank_that_gets_half_of_its_time_is_measured_and_its_device_is_blamed(
    tmp_path: Path,
) -> None:
    faults = [{"when": {"step": 20}, "fault": "slow-rank", "rank": 1, "share": 0.5}]
    found, report = judged(tmp_path, "hardware", faults)

    assert "times as much" in found.reason
    assert not found.false_alarm
    assert report.state == "Succeeded"


def test_a_rank_whose_processor_is_throttled_is_found_by_what_it_takes_of_that(
    tmp_path: Path,
) -> None:
    faults = [{"when": {"step": 20}, "fault": "throttle-rank", "rank": 1, "times": 1.5}]
    found, _ = judged(tmp_path, "hardware", faults)

    assert "for the same work in processor time" in found.evidence[0]
    assert "measured in processor time" in found.reason


def test_a_rank_with_twice_the_work_is_reported_and_nobody_is_blamed(tmp_path: Path) -> None:
    found, _ = judged(tmp_path, "software", [], busier_rank=1, busier=2)

    assert "its device is as fast as theirs" in found.reason
    assert found.rung == "none"
