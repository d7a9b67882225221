"""What a seat says of its run, read and checked as far as one rank can without its peers."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from orchestrator.protocol import runfile
from orchestrator.protocol.fitting import batch_misfits
from orchestrator.worker import MisconfiguredError
from trainer import parallel
from trainer.config import ModelConfig, model_config
from trainer.tokenizer import Tokenizer, open_tokenizer


class Job(NamedTuple):
    """One run's."""

    trainer: runfile.Trainer
    """With `micro_batch` written out."""
    checkpoint: runfile.Checkpoint
    config: ModelConfig
    tokenizer: Tokenizer
    mesh: tuple[int, int]
    """Replicas that are there, shards per replica."""


def read_job(job: dict[str, object], world_size: int) -> Job:
    """Read what a seat says of its run.

    Raises:
        MisconfiguredError: if the run can not be trained as written.
    """
    trainer = msgspec.convert(job.get("trainer", {}), runfile.Trainer)
    layout = msgspec.convert(job.get("parallelism", {}), runfile.Parallelism)
    config = model_config(trainer.model)
    mesh = parallel.mesh_shape(layout, world_size)
    for misfit in batch_misfits(trainer, layout.dp_replicate, mesh[1]):
        raise MisconfiguredError(misfit.message, hint=misfit.hint)
    # Of the whole world, so that a rank needs no more memory when there are fewer.
    share = trainer.global_batch // (layout.dp_replicate * mesh[1])
    trainer = msgspec.structs.replace(trainer, micro_batch=trainer.micro_batch or share)
    return Job(
        trainer,
        msgspec.convert(job.get("checkpoint", {}), runfile.Checkpoint),
        config,
        open_tokenizer(trainer.tokenizer, config.vocab),
        mesh,
    )
