"""Ranks of the trainer go on with fewer replicas than the run asks for, and with more again."""

import tempfile
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from orchestrator.agent import linux
from orchestrator.agent.warm import Warm
from orchestrator.protocol import runfile
from tests.programs.seated import SIZES, a_world
from trainer import parallel
from trainer.data import Samples, open_tokens
from trainer.job import read_job
from trainer.step import Training, Unheard

pytestmark = pytest.mark.process

STEPS = 18


def job(replicas: int, shards: int, **trainer: Any) -> dict[str, Any]:
    """Return a job of 8 samples a step, clipped at every step."""
    settings = {"steps": STEPS, "seqLen": 32, "globalBatch": 8, "clipNorm": 0.1, **trainer}
    return {
        "trainer": {"model": SIZES, **settings},
        "parallelism": {"dpReplicate": replicas, "dpShard": shards},
        "checkpoint": {"everySteps": 10, "memoryEverySteps": 1},
    }


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    linux.adopt_orphans()
    with tempfile.TemporaryFile() as log:
        warm = Warm("trainer.train:main", log)
        warm.wait_ready()
        yield warm
    warm.close()
    linux.adopt_orphans(on=False)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_replicas_that_are_left_train_the_same_samples_though_shares_are_uneven(
    warm: Warm, micro_batch: int | None
) -> None:
    """Of 8 samples, 3 ranks take 2, 2, 4 in micro-batches of the whole world's, or 2, 3, 3."""
    with a_world(warm, parked=4, job=job(4, 1, microBatch=micro_batch)) as world:
        for step, replicas in ((4, 3), (8, 1), (12, 4)):
            world.until(lambda step=step: world.step() >= step)
            world.begin(replicas)
        world.until(world.finished)

        losses = [loss for _, loss in world.result(within=1e-5)[1]]

    assert losses == pytest.approx(losses_of_one_rank(), rel=1e-5)


def losses_of_one_rank() -> list[float]:
    one = job(1, 1)
    trainer = msgspec.convert(one["trainer"], runfile.Trainer)
    read = read_job(one, 1)
    tokens = open_tokens(None, read.tokenizer, "", lambda: None)
    losses: list[float] = []

    class Recorder(Unheard):
        def step_done(self, step: int, *, loss: float, **_: object) -> None:
            losses.append(loss)

    with parallel.alone() as world:
        training = Training(trainer, read.config, Samples(tokens, trainer), world)
        for step in range(1, STEPS + 1):
            training.step(step, Recorder())
    return losses
