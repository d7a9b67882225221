"""What a seat says of its run, read and checked as far as one rank can without its peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from orchestrator.protocol import runfile
from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.cutting import obstacles
from orchestrator.protocol.fitting import batch_misfits, ramp_misfits
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.pinned import ROOT_DIGITS, parts
from orchestrator.worker import MisconfiguredError
from trainer.config import ModelConfig, model_config
from trainer.stamp import Cursor
from trainer.step import Training
from trainer.tokenizer import Tokenizer, open_tokenizer
from trainer.weights.continuing import Continued, open_state
from trainer.weights.sources import open_weights
from trainer.weights.stored import Weights


class Job(NamedTuple):
    """One run's."""

    trainer: runfile.Trainer
    """With `micro_batch` written out, if reduction is fast."""
    checkpoint: runfile.Checkpoint
    detection: runfile.Detection
    config: ModelConfig
    tokenizer: Tokenizer
    layout: Layout
    """With the replicas that are there."""
    initial: Weights | None
    """Weights that it begins from, of the model's sizes."""
    continued: Continued | None = None
    """A checkpoint of another run that it goes on from."""
    begun: str = ""
    """What the digest of either of them begins with; "" if it begins from its seed."""

    @property
    def has_begun(self) -> bool:
        """Whether weights are there to begin from: a model need not draw any."""
        return self.initial is not None or self.continued is not None

    def begin(self, training: Training, start: Cursor, check: Callable[[], None]) -> int:
        """Fill in what the run file says to begin from; return the steps that lie behind that.

        Args:
            training: what to fill.
            start: of a run of this job that has not begun.
            check: called before each tensor; may raise.

        Raises:
            MisconfiguredError: if it is not what it was, or of other data.
        """
        done = 0
        if self.continued is not None:
            done = self.continued.fill(training.optimizer.shards, start, check)
            training.optimizer.set_steps(done)
        elif self.initial is not None:
            self.initial.fill(training.parts, check)
        return done

    @property
    def cadence(self) -> Cadence:
        """How often to save, unless the agent says otherwise."""
        return Cadence(self.checkpoint.memory_every_steps, self.checkpoint.every_steps)

    @property
    def identity(self) -> str:
        """What its checkpoints are marked with: the model, and what it began from."""
        return f"{self.config.fingerprint}-{self.begun}" if self.begun else self.config.fingerprint


def read_job(job: dict[str, object], world_size: int, *, resumes: bool = False) -> Job:
    """Read what a seat says of its run.

    Args:
        job: what it says.
        world_size: ranks of the world.
        resumes: from a checkpoint of its own. A checkpoint of another run that it began from is
            not opened then, if its address is pinned: it may be gone by now.

    Raises:
        MisconfiguredError: if the run can not be trained as written.
    """
    trainer = msgspec.convert(job.get("trainer", {}), runfile.Trainer)
    parallelism = msgspec.convert(job.get("parallelism", {}), runfile.Parallelism)
    config = model_config(trainer.model)
    layout = layout_of(parallelism, world_size)
    whole = layout._replace(dp_replicate=parallelism.dp_replicate)
    for message, hint in (
        *batch_misfits(trainer, whole.dp_replicate, whole.dp_shard),
        *obstacles(config, trainer, whole),
        *ramp_misfits(trainer, whole),
    ):
        raise MisconfiguredError(message, hint=hint)
    if trainer.reduction == "fast":
        # Of the whole world, so that a rank needs no more memory when there are fewer.
        share = trainer.global_batch // whole.readers
        trainer = msgspec.structs.replace(trainer, micro_batch=trainer.micro_batch or share)
    address = trainer.init_from or trainer.continue_from or ""
    begun = parts(address).root
    initial = continued = None
    if not (resumes and begun):
        initial = _initial(trainer.init_from, config)
        continued = _continued(trainer, config)
        if (source := initial or continued) is not None:
            begun = source.digest[:ROOT_DIGITS]
    return Job(
        trainer,
        msgspec.convert(job.get("checkpoint", {}), runfile.Checkpoint),
        msgspec.convert(job.get("detection", {}), runfile.Detection),
        config,
        open_tokenizer(trainer.tokenizer, config.vocab),
        layout,
        initial,
        continued,
        begun,
    )


def _initial(address: str | None, config: ModelConfig) -> Weights | None:
    if address is None:
        return None
    try:
        weights = open_weights(address)
        weights.require(config)
    except MisconfiguredError as error:
        raise MisconfiguredError(f"spec.trainer.initFrom: {error}", hint=error.hint) from error
    return weights


def _continued(trainer: runfile.Trainer, config: ModelConfig) -> Continued | None:
    if trainer.continue_from is None:
        return None
    try:
        state = open_state(trainer.continue_from)
        state.require(config, trainer.steps)
    except MisconfiguredError as error:
        raise MisconfiguredError(f"spec.trainer.continueFrom: {error}", hint=error.hint) from error
    return state


def layout_of(parallelism: runfile.Parallelism, ranks: int) -> Layout:
    """Return how a world of so many ranks is cut.

    A world may have fewer replicas than `dpReplicate`, if `dpShard` says how large one is: nodes
    were lost, and nobody is there to take their seats.

    Raises:
        MisconfiguredError: if it is not made of whole replicas.
    """
    whole = parallelism.layout(ranks)
    replicas, rest = divmod(ranks, whole.shard_count)
    fewer = parallelism.dp_shard is not None and 1 <= replicas < whole.dp_replicate
    if rest or not (replicas == whole.dp_replicate or fewer):
        raise MisconfiguredError(
            f"spec.parallelism is {whole}, expected {ranks} ranks",
            hint="leave out dpShard to have it fill what the other dimensions leave; a world may "
            "have fewer replicas, but each of them whole",
        )
    return whole._replace(dp_replicate=replicas)
