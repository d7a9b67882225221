"""The training loop: one generation of one rank, from its seat to the last step.

`main` is the entrypoint of a supervised run. A rank that is told to leave, or whose peers are
gone, drops everything that belongs to the generation and takes its next seat in the same process.
Whatever it trains on is a function of the run file and the step, so a run that was interrupted
ends with the same bits as one that was not.
"""

from __future__ import annotations

import gc
import importlib
import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import torch

from orchestrator.protocol import runfile
from orchestrator.worker import JobAhead, MisconfiguredError, RankPhase, Seat, Worker, serve
from trainer import parallel
from trainer.checkpoint import Checkpointer, Cursor, Stamp
from trainer.config import ModelConfig, model_config
from trainer.data import Samples, Tokens, open_tokens
from trainer.model import Llama, next_token_loss
from trainer.optim import Optimizer, global_norm
from trainer.tokenizer import Tokenizer, open_tokenizer

_POLL_S = 0.01


class Reporter(Protocol):
    """Who hears how training goes; `orchestrator.worker.Worker` does."""

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        """Hear what the rank does from now on."""

    def entered_collective(self) -> None:
        """Count a collective."""

    def step_done(
        self, step: int, *, loss: float, grad_norm: float, tokens: int, seconds: float
    ) -> None:
        """Hear that a step is complete."""


class Job(NamedTuple):
    """What the run file says, read and checked as far as one rank can without its peers."""

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


class Training:
    """A sharded model, its optimizer, and the steps that they take.

    Args:
        job: what to train.
        samples: what to train on.
        world: with whom.
        empty: leave the weights without values, for a restore to fill in.
    """

    def __init__(
        self,
        job: runfile.Trainer,
        config: ModelConfig,
        samples: Samples,
        world: parallel.World,
        *,
        empty: bool = False,
    ) -> None:
        self.job, self.samples, self.world = job, samples, world
        with torch.device("meta"):
            model = Llama(config)
        # Whole and on the CPU: weights then depend neither on sharding nor on the device. Memory
        # that nobody has written to does not exist yet, so an empty model costs next to nothing.
        model.to_empty(device="cpu")
        if not empty:
            model.init_weights(job.seed)
        self.model = parallel.shard(model, world)
        self.optimizer = Optimizer(self.model, job)
        self._warm = False

    def step(
        self, step: int, reporter: Reporter, ready: Callable[[], bool] = lambda: True
    ) -> list[int]:
        """Take optimizer step `step` (1-based) together with the other ranks, and report it.

        Args:
            step: its number.
            reporter: who hears of it.
            ready: says whether this rank can save its state after this step.

        Returns:
            The ranks that can not; every rank gets the same answer.
        """
        begun = time.monotonic()
        self._announce(reporter, RankPhase.DATA)
        loss_sum = self._accumulate(step, reporter)
        can_save = float(ready())
        self._announce(reporter, RankPhase.OPTIMIZER)
        squares = self.optimizer.take_gradients()
        reporter.entered_collective()
        rows = self.world.gather([loss_sum, squares, self.samples.mark, can_save])
        self._require_same_data([row[2] for row in rows])
        # Every rank adds the same numbers in the same way: they report, and clip by, equal bits.
        loss = math.fsum(row[0] for row in rows) / self.tokens
        grad_norm = global_norm(row[1] for row in rows[: self.world.shards])
        self.optimizer.step(step, grad_norm)
        self._warm = True
        reporter.step_done(
            step,
            loss=loss,
            grad_norm=grad_norm,
            tokens=self.tokens,
            seconds=time.monotonic() - begun,
        )
        return [rank for rank, row in enumerate(rows) if not row[3]]

    def _require_same_data(self, marks: list[float]) -> None:
        others = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
        if others:
            raise MisconfiguredError(
                f"spec.trainer.data is not the same text on every node: rank 0 has other tokens "
                f"than rank {', '.join(map(str, others))}",
                hint="copy it from one node to the others; the demo reads this Python's library",
            )

    @property
    def tokens(self) -> int:
        """Tokens of the global batch."""
        return self.job.global_batch * self.job.seq_len

    def _accumulate(self, step: int, reporter: Reporter) -> float:
        """Leave the gradient of the mean loss in the model; return this rank's sum of losses."""
        share = self.job.global_batch // self.world.size
        size = self.job.micro_batch or share
        first = self.world.rank * share
        losses = []
        for micro, at in enumerate(range(first, first + share, size)):
            self._announce(reporter, RankPhase.DATA, micro)
            batch = self.samples.batch(step, range(at, at + size))
            inputs_BL, targets_BL = (self._tensor(ids) for ids in (batch.inputs, batch.targets))
            self._announce(reporter, RankPhase.FORWARD, micro)
            loss = next_token_loss(self.model(inputs_BL, batch.cuts), targets_BL)
            self._announce(reporter, RankPhase.BACKWARD, micro)
            parallel.reduce_gradients(self.model, now=at + size == first + share)
            torch.autograd.backward(loss / self.tokens)
            losses.append(loss.detach())
        return math.fsum(torch.stack(losses).double().tolist())

    def _tensor(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids)).to(self.world.device)

    def _announce(self, reporter: Reporter, phase: RankPhase, micro_batch: int = 0) -> None:
        # The first step allocates, and on a GPU compiles and tunes: it may take its time.
        reporter.phase(phase if self._warm else RankPhase.WARMING, micro_batch=micro_batch)


def train(worker: Worker, seat: Seat) -> None:
    """Train one generation, as `orchestrator.worker.serve` wants it."""
    job = read_job(seat.job, seat.world_size)
    with parallel.form(worker, seat, job.trainer, job.mesh) as world:
        worker.reached("formed")
        worker.phase(RankPhase.RESTORING)
        tokens = open_tokens(job.trainer.data, job.tokenizer, seat.cache_dir, worker.check)
        training = Training(
            job.trainer,
            job.config,
            Samples(tokens, job.trainer),
            world,
            empty=seat.restore is not None,
        )
        checkpointer = Checkpointer(training.optimizer.shards, world, _stamp(seat, job, tokens))
        done = 0
        if seat.restore is not None:
            done = checkpointer.restore(seat.restore.index, worker.restore_view(seat.restore))
            training.optimizer.set_steps(done)
        worker.reached("restored")
        try:
            for step in range(done + 1, job.trainer.steps + 1):
                _step_and_save(training, checkpointer, worker, step, job)
            _finish(checkpointer, worker, seat, job.trainer.steps, durable=world.replica == 0)
        finally:
            # Until the thread is done it writes to a slot that the next seat may name as free.
            checkpointer.settle()


def _stamp(seat: Seat, job: Job, tokens: Tokens) -> Stamp:
    trainer = job.trainer
    return Stamp(
        seat.run_id,
        job.config.fingerprint,
        seat.generation,
        Cursor(
            samples=0,
            seed=trainer.seed,
            seq_len=trainer.seq_len,
            global_batch=trainer.global_batch,
            data=tokens.digest,
        ),
    )


def _step_and_save(
    training: Training, checkpointer: Checkpointer, worker: Worker, step: int, job: Job
) -> None:
    """Take a step and, if a save is due after it, save on every rank or on none.

    Ranks that skipped saves one by one could end with no step in common to continue from.
    """
    durable = step % job.checkpoint.every_steps == 0
    in_memory = step % job.checkpoint.memory_every_steps == 0
    if not (durable or in_memory) or step == job.trainer.steps:  # the last is saved by _finish
        training.step(step, worker)
        return

    def ready() -> bool:
        worker.phase(RankPhase.CHECKPOINT)  # a slot that is used first is made first: be patient
        return checkpointer.claim(worker)

    unready = training.step(step, worker, ready)
    if not unready:
        worker.phase(RankPhase.CHECKPOINT)
        checkpointer.save(worker, step, durable=durable)
    elif training.world.rank == 0:
        print(  # noqa: T201 - the rank's log
            f"step {step} is not saved: {len(unready)} of {training.world.size} ranks have no free "
            f"slot or are still busy with the save before, the first is rank {unready[0]}",
            file=sys.stderr,
        )


def _finish(
    checkpointer: Checkpointer, worker: Worker, seat: Seat, steps: int, *, durable: bool
) -> None:
    """Make the last state durable, if this rank's shard is one that is written, and say farewell.

    A run whose last save fails has been trained all the same: it says so and finishes.
    """
    worker.phase(RankPhase.FINISHING)
    deadline = time.monotonic() + seat.persist_within_s
    saved = False
    while not saved and time.monotonic() < deadline:
        worker.check()
        saved = checkpointer.save(worker, steps, durable=True)
        if not saved:
            time.sleep(_POLL_S)
    left_s = max(deadline - time.monotonic(), 0.0)
    if not saved or (durable and not worker.await_persisted(steps, left_s)):
        print(f"step {steps} is not durable after {seat.persist_within_s:g} s", file=sys.stderr)  # noqa: T201 - the rank's log
    worker.finished(steps, checkpointer.lanes(steps))


def warm_up() -> None:
    """Import what the first steps would import, in the process that ranks are forked from."""
    # No tensor is touched and no thread started here: neither survives a fork.
    for name in ("torch._dynamo", "torch.distributed._composable", "torch.distributed.tensor"):
        importlib.import_module(name)
    _settle_heap()


def rehearse() -> None:
    """Take a step in a world of one, so that a parked process has its first time behind it."""
    job = runfile.Trainer(global_batch=1, seq_len=8)
    config = ModelConfig(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=16, vocab=16)
    tokens = Tokens(np.arange(32, dtype=np.uint32) % 16, "0", 0)
    # Twice: the second world still meets code that the first one only compiled.
    for _ in range(2):
        with parallel.alone() as world:
            training = Training(job, config, Samples(tokens, job), world)
            training.step(1, Unheard())
        del training  # or it keeps its world's threads
    _settle_heap()


def prepare(ahead: JobAhead, check: Callable[[], None]) -> None:
    """Have this node's text tokenised before anybody waits for it, as `Worker.next_seat` wants it.

    Raises:
        MisconfiguredError: as the job's first seat would.
    """
    trainer = msgspec.convert(ahead.job.get("trainer", {}), runfile.Trainer)
    tokenizer = open_tokenizer(trainer.tokenizer, model_config(trainer.model).vocab)
    open_tokens(trainer.data, tokenizer, ahead.cache_dir, check)


def _settle_heap() -> None:
    """Keep the collector away from the half million objects that torch is made of.

    Looking through them takes a tenth of a second, in the middle of a step or of a recovery, and
    in a forked process it copies every page that they lie on.
    """
    gc.collect()
    gc.freeze()


class Unheard:
    """A reporter that tells nobody."""

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        """Ignore it."""

    def entered_collective(self) -> None:
        """Ignore it."""

    def step_done(
        self, step: int, *, loss: float, grad_norm: float, tokens: int, seconds: float
    ) -> None:
        """Ignore it."""


def main() -> int:
    """Serve as a supervised rank: the entrypoint that run files name by default."""
    return serve(train, rehearse, prepare)
