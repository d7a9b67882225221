"""A run begins from public weights, its checkpoint is read as weights, and the commands tell."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from orchestrator.protocol.footprint import footprint
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.runfile import TrainingRun
from storage.shard import decode_index
from tests import runfiles
from tests.runs import REPOSITORY, Job
from tests.weights import TINY, loaded, written
from trainer.weights.sources import open_weights

pytestmark = pytest.mark.process
MODEL = msgspec.structs.replace(TINY, vocab=1280)


def holdfast(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("holdfast")), *arguments],
        capture_output=True,
        cwd=REPOSITORY,
        env=dict(os.environ, HOLDFAST_HOME=str(root / "home")),
        text=True,
        timeout=60,
        check=False,
    )


def run_of(fields: dict[str, Any]) -> TrainingRun:
    return msgspec.convert(fields, TrainingRun)


@pytest.mark.parametrize("layout", [Layout(dp_shard=2, tp=2), Layout(pp=2, dp_shard=2)], ids=str)
def test_a_run_goes_on_from_public_weights_and_its_own_are_written_as_such(
    layout: Layout, tmp_path: Path
) -> None:
    begun = written(tmp_path / "begun", config=MODEL)
    run = runfiles.fields(
        "from",
        parallelism={"dpShard": 2, "tp": layout.tp, "pp": layout.pp},
        trainer={
            "model": msgspec.to_builtins(MODEL),
            "initFrom": str(tmp_path / "begun"),
            "steps": 1,
            "seqLen": 32,
            "globalBatch": 4,
            "microBatch": 1,
            "learningRate": 1e-4,
            "warmupSteps": 0,
        },
    )
    job = Job(tmp_path / "job", run)
    try:
        code, report = job.conduct("--quiet", timeout_s=100)
    finally:
        job.close()
    assert (code, report.final_step) == (0, 1), job.output()

    folder = str(job.folder.root)
    # What `holdfast plan layout` says of such a run.
    said = footprint(MODEL, run_of(run).spec.trainer, layout, compute=4)
    indices = [decode_index(path.read_bytes()) for path in job.folder.checkpoints.rglob("*.idx")]
    assert {index.step for index in indices} == {1}
    assert max(sum(c.size for c in index.chunks) for index in indices) == said.checkpoint
    done = holdfast(job.root, "weights", "convert", folder, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    shown = holdfast(job.root, "weights", "show", "from", "--check", "-o", "json")
    assert shown.returncode == 0, shown.stderr

    told = json.loads(shown.stdout)
    assert (told["parameters"], told["finite"]) == (MODEL.parameters, True)
    ended = loaded(open_weights(str(tmp_path / "out")))
    for (name, before), after in zip(begun.named_parameters(), ended.parameters(), strict=True):
        # One step of AdamW moves a weight by the learning rate at most, a hundredth of it here.
        assert not torch.equal(before, after), name
        torch.testing.assert_close(before, after, atol=1.1e-4, rtol=0, msg=name)


def test_weights_that_are_refused_end_a_command_with_code_2_and_a_hint(tmp_path: Path) -> None:
    written(tmp_path / "one")
    os.truncate(tmp_path / "one/model.safetensors", 1000)

    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    done = holdfast(tmp_path, "weights", "convert", one, "--out", two)

    assert done.returncode == 2
    message, hint = done.stderr.splitlines()
    assert "model.safetensors" in message
    assert hint.startswith("hint: ")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
