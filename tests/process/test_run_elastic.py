"""A real trainer goes on with fewer replicas, grows back, and ends with the bits of any number."""

from pathlib import Path
from typing import Any

import pytest

from tests import runfiles, tiny
from tests.runs import Job

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]
STEPS = 250


def run(name: str, replicas: int) -> dict[str, Any]:
    return runfiles.fields(
        name,
        nodes={"count": replicas, "ranksPerNode": 1, "spares": 0},
        parallelism={"dpReplicate": replicas, "dpShard": 1},
        trainer={
            "model": tiny.MODEL,
            "steps": STEPS,
            "seqLen": 32,
            "globalBatch": 2,
            "reduction": "deterministic",
        },
        checkpoint={"everySteps": 125, "memoryEverySteps": 5},
        detection={"detectWithin": "3s"},
    )


def test_a_run_that_shrinks_and_grows_back_ends_with_the_bits_of_one_that_has_one_replica(
    tmp_path: Path,
) -> None:
    # So slow that the node is back, and warm, long before the last step.
    slow = {"when": {"step": 2}, "fault": "slow-rank", "rank": 0, "share": 0.3}
    lost = {"when": {"step": 20}, "fault": "lose-node", "node": "node-1", "for": "500ms"}
    elastic, alone = (
        Job(tmp_path / "elastic", run("elastic", 2), [slow, lost]),
        Job(tmp_path / "alone", run("alone", 1)),
    )
    try:
        code, report = elastic.conduct("--quiet", timeout_s=150)
        assert code == 0, report.reason
        _, twin = alone.conduct("--quiet", timeout_s=100)
    finally:
        elastic.close()
        alone.close()

    assert report.rungs == {"grow back": 1, "shrink": 1, "start": 1}, report.rungs
    assert report.ledger["lost_capacity"] > 0
    assert report.final_state_digest == twin.final_state_digest
    assert report.losses == twin.losses
    assert (report.divergences, report.replicas_differ) == ([], [])
    assert elastic.leftovers() == []
