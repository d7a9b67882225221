"""What a seat says of its run, read and checked as far as one rank can without its peers."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from orchestrator.protocol import runfile
from orchestrator.worker import MisconfiguredError
from trainer import parallel
from trainer.config import ModelConfig, model_config
from trainer.tokenizer import Tokenizer, open_tokenizer


class Job(NamedTuple):
    """One run's."""

    trainer: runfile.Trainer
    checkpoint: runfile.Checkpoint
    config: ModelConfig
    tokenizer: Tokenizer
    mesh: tuple[int, int]
    """Replicas, shards per replica."""


def read_job(job: dict[str, object], world_size: int) -> Job:
    """Read what a seat says of its run.

    Raises:
        MisconfiguredError: if the run can not be trained as written.
    """
    trainer = msgspec.convert(job.get("trainer", {}), runfile.Trainer)
    layout = msgspec.convert(job.get("parallelism", {}), runfile.Parallelism)
    config = model_config(trainer.model)
    share, rest = divmod(trainer.global_batch, world_size)
    if rest:
        raise MisconfiguredError(
            f"spec.trainer.globalBatch is {trainer.global_batch}, "
            f"expected a multiple of the {world_size} ranks",
            hint="every rank takes the same number of samples",
        )
    if share % (trainer.micro_batch or share):
        raise MisconfiguredError(
            f"spec.trainer.microBatch is {trainer.micro_batch}, "
            f"expected a divisor of each rank's {share} samples",
            hint="globalBatch / ranks must be a multiple of microBatch",
        )
    return Job(
        trainer,
        msgspec.convert(job.get("checkpoint", {}), runfile.Checkpoint),
        config,
        open_tokenizer(trainer.tokenizer, config.vocab),
        parallel.mesh_shape(layout, world_size),
    )
