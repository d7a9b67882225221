"""A real run of which a copy of its state is stuck, and another one is cut short by a kill."""

from pathlib import Path

import pytest

from storage.catalog import Catalog
from storage.digest import render
from storage.local import LocalStore
from tests import runfiles
from tests.programs.alone import one_rank
from tests.programs.halted import KILLED_AT, STUCK_AT
from tests.runs import Job

pytestmark = [pytest.mark.process, pytest.mark.timeout(150)]
STEPS, DURABLE, MEMORY = 20, 8, 4
SIZES = {"dim": 32, "layers": 1, "heads": 2, "kvHeads": 1, "ffnDim": 32, "vocab": 1280}


def test_a_half_copied_state_is_never_committed_and_the_run_goes_on_from_the_one_before(
    tmp_path: Path,
) -> None:
    run = runfiles.fields(
        "halted",
        nodes={"count": 1, "ranksPerNode": 1, "spares": 0},
        parallelism={"dpReplicate": 1, "dpShard": 1},
        trainer={
            "entrypoint": "tests.programs.halted:main",
            "model": SIZES,
            "steps": STEPS,
            "seqLen": 16,
            "globalBatch": 2,
        },
        checkpoint={"everySteps": DURABLE, "memoryEverySteps": MEMORY},
    )
    job = Job(tmp_path, run)
    try:
        code, report = job.conduct("--quiet", timeout_s=120)
        records = Catalog(LocalStore(job.folder.checkpoints)).commits()
    finally:
        job.close()

    assert (code, report.final_step) == (0, STEPS), report.reason
    # What was stuck is given up and counted: training went on, and saves after it are whole.
    (reason,) = [failed.reason for failed in report.save_failures if failed.step == STUCK_AT]
    assert "node-0: rank 0: " in reason
    assert "bytes were copied after" in reason
    # What was cut short is of generation 1, and nothing of it is a checkpoint.
    (incident,) = report.incidents
    assert (incident.kind, incident.restored_step) == ("crash", KILLED_AT - MEMORY)
    assert incident.restored_from == "own memory (1 ranks)"
    # (Whether the older one was committed before its rank died is the machine's affair.)
    committed = {(record.step, record.epoch) for record in records}
    assert {step for step, epoch in committed if epoch == 1} <= {DURABLE}
    assert (STEPS, 2) in committed
    lanes, losses = one_rank({key: run["spec"][key] for key in ("trainer", "parallelism")})
    assert report.final_state_digest == render(lanes)
    assert report.losses == losses
    assert job.leftovers() == []
