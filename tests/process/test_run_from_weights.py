"""A run begins from public weights, its checkpoint is read as weights, and the commands tell."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from orchestrator.cli.spawned import pin_weights
from orchestrator.protocol.footprint import footprint
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worker import MisconfiguredError
from storage.shard import decode_index
from tests import runfiles
from tests.runs import REPOSITORY, Job
from tests.weights import TINY, loaded, model_of, run_folder, written
from trainer import parallel
from trainer.data import Samples, open_data
from trainer.feed import cursor_of
from trainer.job import read_job
from trainer.optim import STATES
from trainer.reporter import Unheard
from trainer.step import Training
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
        # Of the node it is no matter, and each imports torch.
        nodes={"count": 1, "ranksPerNode": 4, "spares": 0},
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
    after = assert_another_cut_goes_on(run, folder)
    assert_it_goes_on_without_an_agent(run, folder, after, tmp_path)


def assert_it_goes_on_without_an_agent(
    run: dict[str, Any], folder: str, losses: list[float], tmp_path: Path
) -> None:
    job = {**run["spec"]["trainer"], "steps": 2, "microBatch": 4, "initFrom": None}
    (tmp_path / "job.json").write_text(json.dumps({"trainer": {**job, "continueFrom": folder}}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "trainer.alone", str(tmp_path / "job.json")]
    done = subprocess.run(
        command,
        capture_output=True,
        cwd=REPOSITORY,
        env=dict(os.environ, **world),
        text=True,
        timeout=60,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    said = line.split()
    assert (said[:2], said[5]) == (["step", "2"], losses[0].hex())


def assert_another_cut_goes_on(run: dict[str, Any], folder: str) -> list[float]:
    """One rank takes the state of several, to the bit, and goes on as one that never ended.

    Returns:
        The loss of the step that it takes.
    """
    trainer = {**run["spec"]["trainer"], "steps": 2, "microBatch": 4}
    further = read_job({"trainer": {**trainer, "initFrom": None, "continueFrom": folder}}, 1)
    assert further.continued is not None
    states = further.continued.states
    with parallel.alone() as world:
        samples = Samples(
            open_data(further.trainer.data, further.tokenizer, "", lambda: None), further.trainer
        )
        training = Training(further.trainer, further.config, samples, world, empty=True)
        start = cursor_of(samples, further.trainer)
        done = further.begin(training, start, lambda: None)
        for shard in training.optimizer.shards:
            for state in STATES:
                assert torch.equal(getattr(shard, state), states[state].read(shard.name))
            assert shard.exp_avg_sq.any()
        after = Heard()
        training.step(done + 1, after)

        # The run that ended had one step, and so another learning rate at it.
        alone = read_job({"trainer": {**trainer, "steps": 1}}, 1)
        assert alone.initial is not None
        first = Training(alone.trainer, alone.config, samples, world, empty=True)
        alone.initial.fill(first.parts)
        first.step(1, Unheard())
        whole = Training(further.trainer, further.config, samples, world, empty=True)
        for mine, theirs in zip(whole.optimizer.shards, first.optimizer.shards, strict=True):
            for state in STATES:
                getattr(mine, state).copy_(getattr(theirs, state))
        whole.optimizer.set_steps(1)
        never = Heard()
        whole.step(2, never)
    assert done == 1
    assert after.losses == pytest.approx(never.losses, rel=1e-6)
    with pytest.raises(MisconfiguredError, match="checkpoint's seed is 0, expected 7"):
        further.continued.fill(
            training.optimizer.shards, msgspec.structs.replace(start, seed=7), lambda: None
        )
    for changed, says in (
        ({"steps": 1}, "continueFrom: the checkpoint has 1 steps behind it, expected fewer than"),
        ({"model": "debug"}, "continueFrom: embedding.weight is of shape"),
        ({"continueFrom": f"{folder}@7"}, "continueFrom: no checkpoint of step 7"),
    ):
        other = {**trainer, "initFrom": None, "continueFrom": folder, **changed}
        with pytest.raises(MisconfiguredError, match=says):
            read_job({"trainer": other}, 1)
    return after.losses


class Heard(Unheard):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def step_done(self, step: int, *, loss: float, **_: object) -> None:
        self.losses.append(loss)


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


def test_a_run_that_can_not_begin_from_its_weights_is_refused_before_anything_is_started(
    tmp_path: Path,
) -> None:
    written(tmp_path / "weights", config=MODEL)
    file = tmp_path / "run.yaml"
    for command, address, says in (
        ("run", tmp_path / "none", "spec.trainer.initFrom: no such folder"),
        ("validate", tmp_path / "weights", "spec.trainer.initFrom: embedding.weight is of shape "),
    ):
        file.write_text(runfiles.text("never", trainer={"initFrom": str(address)}))

        done = holdfast(tmp_path, command, str(file))

        assert (done.returncode, done.stdout) == (2, "")
        message, hint = done.stderr.splitlines()
        assert says in message
        assert hint.startswith("hint: ")
        assert not (tmp_path / "home").exists()


def test_the_checkpoint_that_a_run_begins_from_is_settled_once(tmp_path: Path) -> None:
    source = run_folder(tmp_path / "source", model_of(MODEL), step=7)
    asked = run_of(
        runfiles.fields(
            "pinned", trainer={"model": msgspec.to_builtins(MODEL), "initFrom": str(source)}
        )
    )
    place = tmp_path / "pinned"
    place.mkdir()

    begun = pin_weights(asked, place)
    (place / "run.json").write_bytes(msgspec.json.encode(begun))
    run_folder(source, model_of(MODEL, 1), step=8)

    address = begun.spec.trainer.init_from
    assert address is not None
    assert address.startswith(f"{source}@7-")
    assert pin_weights(asked, place) == begun
    assert pin_weights(begun, place) == begun
    elsewhere = pin_weights(asked, tmp_path / "new").spec.trainer.init_from
    assert elsewhere is not None
    assert elsewhere.startswith(f"{source}@8-")
