"""A Llama that is trained in seconds: two nodes of two ranks, two replicas, one spare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.core.report import Report
from tests import runfiles
from tests.runs import Job

STEPS = 40
MODEL = {"dim": 64, "layers": 2, "heads": 4, "kvHeads": 2, "ffnDim": 128, "vocab": 1280}
RUN = runfiles.fields(
    "drawn",
    trainer={"model": MODEL, "steps": STEPS, "seqLen": 64, "globalBatch": 4},
    checkpoint={"everySteps": 10, "memoryEverySteps": 3},
    detection={"detectWithin": "3s"},
)


def undisturbed(root: Path, run: dict[str, Any] = RUN) -> Report:
    """Run a job with nothing let loose on it; return its report.

    All ranks are on one node, without a spare: each node has to import torch first.
    """
    spec = run["spec"]
    ranks = spec["nodes"]["count"] * spec["nodes"]["ranksPerNode"]
    nodes = {"count": 1, "ranksPerNode": ranks, "spares": 0}
    job = Job(root, run | {"spec": spec | {"nodes": nodes}})
    try:
        code, report = job.conduct("--quiet", timeout_s=150)
        assert code == 0, report.reason
        assert_nothing_broke(report)
        return report
    finally:
        job.close()


def assert_nothing_broke(report: Report) -> None:
    """Nothing was restarted, and no device or network blamed.

    Where processes wait for cores, a sound rank may be measured, and found as fast as others are.
    """
    cleared = ("straggler", "none", "software")
    assert [i for i in report.incidents if (i.kind, i.rung, i.cause) != cleared] == []


def assert_same_bits(report: Report, twin: Report, words: str) -> None:
    """Nothing that was let loose on a run has changed a bit of what it is for."""
    assert report.final_step == STEPS, words
    assert report.final_state_digest == twin.final_state_digest, words
    assert report.losses == twin.losses, words
    assert report.losses_digest == twin.losses_digest
    assert (report.divergences, report.replicas_differ, report.losses_missing) == ([], [], []), (
        words
    )
