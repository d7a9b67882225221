"""A run is given other sizes and run again: its state is cut anew, to the bit."""

import base64
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.decisions import StartGeneration
from orchestrator.core.report import Report
from orchestrator.protocol.cutting import Cut
from orchestrator.protocol.ids import Generation, Step
from orchestrator.worlds.simulated.store import Stored
from storage.address import open_store
from storage.manifest import commit_key
from tests import runfiles, tiny
from tests.buckets import Server
from tests.programs.played import wait_for
from tests.runs import Job
from tests.simulated import SimulatedJob

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
STEPS, SAVED = 14, 6
BATCH = {"seqLen": 32, "globalBatch": 4, "microBatch": 1}


def sized(
    parallelism: dict[str, int],
    *,
    ranks: int = 2,
    nodes: int = 1,
    steps: int = STEPS,
    **checkpoint: Any,
) -> dict[str, Any]:
    return runfiles.fields(
        "sized",
        nodes={"count": nodes, "ranksPerNode": ranks // nodes, "spares": 0},
        parallelism=parallelism,
        trainer={"model": tiny.MODEL, "steps": steps, **BATCH},
        checkpoint={"everySteps": SAVED, "memoryEverySteps": 3, **checkpoint},
        detection={"detectWithin": "3s"},
        recovery={"softwareBudget": 0},
    )


def ended(root: Path, run: dict[str, Any], *faults: dict[str, Any]) -> tuple[int, Report, Job]:
    job = Job(root, run, list(faults))
    try:
        return *job.conduct("--quiet", timeout_s=150), job
    finally:
        job.close()


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with dpShard 2 that has failed behind its first checkpoint."""
    root = tmp_path_factory.mktemp("former") / "job"
    # On a busy machine, faults come steps later than they are asked for: no more is saved by then.
    full = {"when": {"step": SAVED + 3}, "fault": "full-disk", "node": "node-0"}
    dies = {"when": {"step": 2 * SAVED}, "fault": "exit-rank", "rank": 1}
    code, report, _ = ended(root, sized({"dpShard": 2}), full, dies)
    assert code == 3, report.reason
    assert [found.step for found in report.checkpoints] == [SAVED]
    return root


def orders(job: Job | SimulatedJob) -> list[StartGeneration]:
    decisions = [d for entry in job.entries() for d in entry.decisions]
    return [d for d in decisions if isinstance(d, StartGeneration)]


def test_a_run_that_is_cut_anew_and_loses_a_rank_at_once_has_the_bits_of_one_that_loses_none(
    failed: Path, tmp_path: Path
) -> None:
    killed = {"when": {"step": SAVED + 1}, "fault": "kill-rank", "rank": 1}
    run = sized({"tp": 2}, nodes=2)
    shutil.copytree(failed, tmp_path / "twin")
    shutil.copytree(failed, tmp_path / "killed")

    _, twin, _ = ended(tmp_path / "twin", run)
    code, report, job = ended(tmp_path / "killed", run, killed)

    assert code == 0, report.reason
    assert (report.final_step, report.losses) == (STEPS, twin.losses)
    assert report.final_state_digest == twin.final_state_digest
    assert (report.divergences, report.replicas_differ, report.losses_missing) == ([], [], [])
    for order in (started := orders(job)):
        assert order.restore is not None
        assert (order.restore.step, order.restore.commit) == (SAVED, commit_key(SAVED, 1))
        assert order.restore.cut_anew == "from 2 shards (dpShard 2) into 2 shards (tp 2)"
        assert f"cut anew {order.restore.cut_anew}" in order.reason
    assert len(started) == 2
    (incident,) = report.incidents
    assert incident.kind == "crash"
    assert incident.restored_from == "durable tier, cut anew (2 ranks)"
    # What the other cut left stays as it was.
    assert [found.step for found in report.checkpoints] == [SAVED, 2 * SAVED, STEPS]
    assert job.leftovers() == []
    assert_simulated_alike(run, killed, started, report)


def assert_simulated_alike(
    run: dict[str, Any], killed: dict[str, Any], started: list[StartGeneration], report: Report
) -> None:
    """A simulated cluster with the same checkpoint is told the same by the controller."""
    left = Stored(Step(SAVED), Generation(1), 2, Cut(dp_shard=2))
    simulated = SimulatedJob(run, [killed], left=[left])
    run["spec"]["trainer"]["options"] = {"step_s": 0.2}

    code, told = simulated.conduct()

    assert (code, told.losses_missing) == (0, [])
    assert [order.restore for order in orders(simulated)] == [order.restore for order in started]
    assert orders(simulated)[0].reason == started[0].reason
    assert told.incidents[0].restored_from == report.incidents[0].restored_from
    assert [found.step for found in told.checkpoints] == [
        found.step for found in report.checkpoints
    ]


def test_what_is_cut_anew_is_the_state_that_was_saved_to_the_bit(
    failed: Path, tmp_path: Path, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever continues with no step left ends with the state that it has found.

    One of them finds it in a bucket, for which its rank needs the credentials and the key.
    """
    monkeypatch.setenv("HOLDFAST_TEST_KEY", base64.b64encode(bytes(range(32))).decode())
    bucket = s3.uri(s3.bucket(), encrypt="HOLDFAST_TEST_KEY")
    digests = set()
    for number, (sizes, ranks, uri) in enumerate(
        (
            ({"dpShard": 2}, 2, str(tmp_path / "same")),
            ({"dpShard": 1}, 1, bucket),
            ({"pp": 2, "tp": 2}, 4, str(tmp_path / "cut")),
            ({"dpReplicate": 2, "dpShard": 1}, 2, str(tmp_path / "twice")),
        )
    ):
        copied(str(failed / "run/checkpoints"), uri)
        run = sized(sizes, ranks=ranks, steps=SAVED, uri=uri)
        code, report, job = ended(tmp_path / str(number), run)

        assert (code, report.final_step) == (0, SAVED), report.reason
        (order,) = orders(job)
        assert order.restore is not None
        assert bool(order.restore.cut_anew) == (sizes != {"dpShard": 2})
        digests.add(report.final_state_digest)

    assert len(digests) == 1


def test_a_store_that_refuses_only_a_rank_is_told_as_a_fault_of_storage_and_costs_a_restart(
    failed: Path, tmp_path: Path, s3: Server
) -> None:
    uri = s3.uri(s3.bucket())
    copied(str(failed / "run/checkpoints"), uri)
    # No restart is left for faults of the job, and nobody but ranks reads shards by then.
    run = sized({"dpShard": 1}, ranks=1, steps=SAVED, uri=uri, scrubMibPerSecond=0)
    job = Job(tmp_path / "job", run)
    try:
        job.start("--quiet")
        wait_for(lambda: job.folder.journal.exists() and len(orders(job)) == 1, 60)
        s3.be("private 1")
        code = job.finish(150)
        report, described = job.report(), job.holdfast("describe", "incident", "inc-1").stdout
    finally:
        s3.be("well")
        job.close()

    assert (code, report.final_step) == (0, SAVED), report.reason
    (incident,) = report.incidents
    assert (incident.kind, incident.cause) == ("unrestorable", "storage")
    assert "rank 0 on node-0 can not read its state: StorageRefusedError: " in described
    assert "AccessDenied" in described
    assert [order.restore and order.restore.step for order in orders(job)] == [SAVED, SAVED]


def copied(uri: str, to: str) -> None:
    source, target = open_store(uri), open_store(to)
    for key in source.keys():  # noqa: SIM118 - a store is no mapping
        target.put(key, source.get(key))
