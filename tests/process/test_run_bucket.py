"""Whole runs whose durable tier is a bucket of object storage."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.address import open_store
from storage.catalog import Catalog
from storage.encrypted import MAGIC
from tests.buckets import CREDENTIALS, Server
from tests.programs.played import wait_for
from tests.runs import Job, steps_job

pytestmark = pytest.mark.process
KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    (tmp_path / "lockstep").mkdir()
    lockstep = str(tmp_path / "lockstep")
    run = steps_job(nodes__spares=0, trainer__options={"lockstep": lockstep, "steps": 120})
    run["spec"]["trainer"]["steps"] = 120
    one = Job(tmp_path, run)
    yield one
    one.close()


def assert_no_secrets(job: Job) -> None:
    for path in job.root.rglob("*"):
        if path.is_file():
            for secret in (CREDENTIALS["AWS_SECRET_ACCESS_KEY"], KEY):
                assert secret.encode() not in path.read_bytes(), path


def test_nodes_that_are_all_lost_are_replaced_from_the_bucket_and_all_in_it_is_encrypted(
    s3: Server, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_TEST_KEY", KEY)
    bucket = s3.bucket()
    uri = s3.uri(bucket, encrypt="HOLDFAST_TEST_KEY")
    job.run["spec"]["checkpoint"]["uri"] = uri
    job.run["spec"]["nodes"]["spares"] = 2
    job.run["spec"]["trainer"]["options"] |= {"step_s": 0.05, "save_every": 5, "durable_every": 40}
    job.faults = [
        {"when": {"step": 78}, "fault": "lose-node", "node": node} for node in ("node-0", "node-1")
    ]

    code, report = job.conduct()

    assert (code, report.state) == (0, "Succeeded"), report.reason
    assert [incident.restored_step for incident in report.incidents][-1] == 40
    assert report.incidents[-1].restored_from.startswith("durable tier")
    assert report.losses == [(step, 1.0 / step) for step in range(1, 121)]
    found, rejections = Catalog(open_store(uri)).newest_verified(run_id="steps")
    assert found is not None
    assert (found.step, rejections) == (120, [])
    for key in open_store(s3.uri(bucket)).keys():  # noqa: SIM118 - a store is no mapping
        assert s3.client.cat_file(f"{bucket}/run/{key}").startswith(MAGIC), key
    assert_no_secrets(job)
    assert job.leftovers() == []


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("vanished", "there is no bucket"),
        ("ahead 3600", "ClockSkewError: RequestTimeTooSkewed: the clock here is"),
        ("read-only", "StorageRefusedError: AccessDenied"),
    ],
)
def test_a_bucket_that_refuses_costs_the_saves_of_that_time_and_training_goes_on(
    s3: Server, job: Job, how: str, said: str
) -> None:
    bucket = s3.bucket()
    job.run["spec"]["checkpoint"]["uri"] = s3.uri(bucket)
    job.run["spec"]["trainer"]["options"] |= {"step_s": 0.05, "save_every": 5, "durable_every": 20}
    # To load the client of a bucket takes a busy machine seconds in which its agents are silent.
    job.run["spec"]["detection"]["detectWithin"] = "20s"
    job.train()

    try:
        s3.drop(bucket) if how == "vanished" else s3.be(how)
        wait_for(lambda: said in logged(job))
    finally:
        s3.client.call_s3("create_bucket", Bucket=bucket) if how == "vanished" else s3.be("well")
    code = job.finish()

    report = job.report()
    assert (code, report.state) == (0, "Succeeded"), report.reason
    assert report.incidents == []
    assert report.checkpoints[-1].step == 120
    assert report.losses == [(step, 1.0 / step) for step in range(1, 121)]
    assert any(said in failure.reason for failure in report.save_failures)
    assert said in job.holdfast("describe", "run").stdout
    assert_no_secrets(job)


def logged(job: Job) -> str:
    return "".join(path.read_text() for path in job.folder.root.rglob("*.log"))
