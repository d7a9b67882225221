"""Ranks of the trainer go on with fewer replicas than the run asks for, and with more again."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.agent.warm import Warm
from orchestrator.protocol.sizes import ModelConfig
from tests import texts
from tests.programs.alone import one_rank
from tests.programs.seated import SIZES, a_world, left_alone
from tests.weights import written

pytestmark = pytest.mark.process
ENTRYPOINT = "tests.programs.wearing:main"

STEPS = 18
CONFIG = msgspec.convert(SIZES, ModelConfig)


def job(replicas: int, shards: int, stages: int = 1, **trainer: Any) -> dict[str, Any]:
    """Return a job of 8 samples a step, clipped at every step."""
    settings = {"steps": STEPS, "seqLen": 32, "globalBatch": 8, "clipNorm": 0.1, **trainer}
    return {
        "trainer": {"model": SIZES, **settings},
        "parallelism": {"dpReplicate": replicas, "dpShard": shards, "pp": stages},
        "checkpoint": {"everySteps": 10, "memoryEverySteps": 1},
    }


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

    assert losses == pytest.approx([loss for _, loss in one_rank(job(1, 1))[1]], rel=1e-5)


def test_deterministic_reduction_gives_the_same_bits_whatever_the_number_of_replicas(
    warm: Warm,
) -> None:
    """Of 7 samples, 4 replicas take 1, 2, 2, 2, two take 3, 4, and three take 2, 2, 3."""
    settings = {"globalBatch": 7, "reduction": "deterministic"}
    with a_world(warm, parked=4, job=job(4, 1, **settings)) as world:
        for step, replicas in ((4, 2), (8, 3), (12, 4)):
            world.until(lambda step=step: world.step() >= step)
            world.begin(replicas)
        world.until(world.finished)

        assert world.result() == one_rank(job(1, 1, **settings))


def test_deterministic_reduction_gives_the_same_bits_where_replicas_are_sharded(
    warm: Warm,
) -> None:
    settings = {"globalBatch": 10, "reduction": "deterministic"}
    expected = left_alone(warm, job(1, 2, **settings))

    with a_world(warm, parked=6, job=job(3, 2, **settings)) as world:
        for step, replicas in ((4, 1), (8, 2), (12, 3)):
            world.until(lambda step=step: world.step() >= step)
            world.begin(replicas)
        world.until(world.finished)

        assert world.result() == expected


def test_deterministic_reduction_gives_the_same_bits_where_replicas_are_pipelines(
    warm: Warm,
) -> None:
    settings = {"globalBatch": 7, "reduction": "deterministic"}
    expected = left_alone(warm, job(1, 1, 2, **settings))

    with a_world(warm, parked=6, job=job(3, 1, 2, **settings)) as world:
        for step, replicas in ((4, 1), (8, 2), (12, 3)):
            world.until(lambda step=step: world.step() >= step)
            world.begin(replicas)
        world.until(world.finished)

        assert world.result() == expected
        assert min(world.restored_from[6:]) >= 1


def test_deterministic_reduction_gives_the_same_bits_with_all_else_that_a_run_may_ask_for(
    warm: Warm, tmp_path: Path
) -> None:
    """Rounds are 5, then 7 and then 3, and no two of 1, 2 and 3 replicas take them alike."""
    written(tmp_path / "weights", config=CONFIG)
    settings = {
        "globalBatch": 10,
        "reduction": "deterministic",
        "batchRamp": [
            {"tokens": 10 * 32 * 6, "globalBatch": 14},
            {"tokens": 10 * 32 * 14, "globalBatch": 6},
        ],
        "precision": "bf16",
        "activationCheckpointing": "selective",
        "positions": "document",
        "initFrom": str(tmp_path / "weights"),
        "data": msgspec.to_builtins(texts.mixed(tmp_path, validation=0.2)),
        "evalEverySteps": 5,
        "evalSamples": 6,
    }
    expected = left_alone(warm, job(1, 2, **settings))

    with a_world(warm, parked=6, job=job(3, 2, **settings)) as world:
        for step, replicas in ((4, 1), (8, 2), (12, 3)):
            world.until(lambda step=step: world.step() >= step)
            world.begin(replicas)
        world.until(world.finished)
        log = (world.memory / "ranks.log").read_text()

        assert world.result() == expected
        assert min(world.restored_from[6:]) >= 1
    for step in (5, 10, 15):
        assert f"evaluation after step {step}: " in log
