"""Ranks train on a mixture, evaluate what is held back, and wait for a source that is slow."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.agent.warm import Warm
from orchestrator.detect.hang import STARVED_WITHIN_S
from tests import runfiles, texts
from tests.programs.seated import JOB, a_world, left_alone
from tests.programs.starving import SLOW_S
from tests.runs import Job

pytestmark = pytest.mark.process
MODEL = {"dim": 32, "layers": 1, "heads": 2, "kvHeads": 1, "ffnDim": 48, "vocab": 1280}


def test_a_mixture_is_trained_on_and_evaluated_across_a_death_without_changing_a_bit(
    warm: Warm, tmp_path: Path
) -> None:
    data = msgspec.to_builtins(texts.mixed(tmp_path, validation=0.2))
    ramp = [{"tokens": 1000, "globalBatch": 8}]  # from step 9 on
    longer = [{"tokens": 1500, "seqLen": 64}]  # from step 11 on, which follows the death
    ramps = {"batchRamp": ramp, "lengthRamp": longer}
    job = {**JOB, "trainer": {**JOB["trainer"], "data": data, **ramps}}
    evaluated = {**job, "trainer": {**job["trainer"], "evalEverySteps": 8, "evalSamples": 6}}
    expected = left_alone(warm, job)

    with a_world(warm, parked=5, job=evaluated) as world:
        world.until(lambda: world.step() >= 10)
        world.kill(1)
        world.begin()
        world.until(world.finished)
        log = (world.memory / "ranks.log").read_text()

        assert world.result() == expected
    # What is evaluated again after a death comes to the same.
    told = dict.fromkeys(line for line in log.splitlines() if line.startswith("evaluation after"))
    assert [line.split()[3] for line in told] == ["8:", "16:", "24:"]
    few = data["sources"][0]["uri"]
    assert f"data, source {few}: epoch 2 begins" in log
    assert f"data, source {few}: 6 documents of 1 file" in log


def starved(tmp_path: Path, *faults: dict[str, Any], entrypoint: str = "trainer.train:main") -> Job:
    documents = texts.jsonl(tmp_path / "a.jsonl", texts.documents(40))
    run = runfiles.fields(
        "starved",
        nodes={"count": 1, "ranksPerNode": 2, "spares": 0},
        parallelism={"dpReplicate": 1, "dpShard": 2},
        trainer={
            "entrypoint": entrypoint,
            "model": MODEL,
            "steps": 20,
            "seqLen": 16,
            "globalBatch": 2,
            "data": {"sources": [{"uri": documents}]},
        },
        checkpoint={"everySteps": 10, "memoryEverySteps": 5},
        detection={"detectWithin": "2s"},
    )
    return Job(tmp_path / "job", run, list(faults))


def test_a_source_that_is_slow_is_waited_for_and_is_no_hang(tmp_path: Path) -> None:
    job = starved(tmp_path, entrypoint="tests.programs.starving:main")
    try:
        code, report = job.conduct("--quiet", timeout_s=90)
    finally:
        job.close()

    assert (code, report.final_step) == (0, 20)
    assert "hang" not in [incident.kind for incident in report.incidents]
    assert report.ledger["effective"] > SLOW_S


def test_a_source_that_stops_is_found_within_ten_seconds_and_a_few_steps(tmp_path: Path) -> None:
    job = starved(tmp_path, {"when": {"step": 8}, "fault": "stall-data", "rank": 1})
    try:
        code, report = job.conduct("--quiet", timeout_s=120)
    finally:
        job.close()

    assert (code, report.final_step) == (0, 20)
    (fault,), (found,) = report.faults, report.incidents
    assert found.kind == "hang"
    assert "rank 1" in found.suspects
    assert "samples do not come" in found.evidence[0]
    # Steps take some hundredths of a second here; the rest is for a machine that is busy.
    assert found.began_s + found.detected_after_s - fault.at_s < STARVED_WITHIN_S + 1.0
