"""The training loop: one generation of one rank, from its seat to the last step.

`main` is the entrypoint of a supervised run. A rank that is told to leave, or whose peers are
gone, drops everything that belongs to the generation and takes its next seat in the same process.
Whatever it trains on is a function of the run file and the step, so a run that was interrupted
ends with the same bits as one that was not.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
from collections.abc import Callable

import msgspec
import numpy as np

from orchestrator.protocol import runfile
from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.ids import Generation
from orchestrator.worker import JobAhead, RankPhase, Seat, Worker, serve
from trainer import kernels, parallel
from trainer.checkpoint import Checkpointer, Readiness
from trainer.config import ModelConfig, model_config
from trainer.data import Samples, open_data
from trainer.feed import Feed, cursor_of
from trainer.job import Job, read_job
from trainer.metrics import open_log
from trainer.reporter import Unheard
from trainer.restoring import restored
from trainer.stamp import Stamp
from trainer.step import Training, Word
from trainer.tokenizer import open_tokenizer
from trainer.tokens import Tokens

_POLL_S = 0.01


def train(worker: Worker, seat: Seat) -> None:
    """Train one generation, as `orchestrator.worker.serve` wants it."""
    job = read_job(seat.job, seat.world_size, resumes=seat.restore is not None)
    with (
        parallel.form(worker, seat, job.trainer, job.layout) as world,
        open_log(seat, job.trainer, world.device) as note,
    ):
        kernels.keep_in(seat.cache_dir)
        worker.in_groups(world.groups)
        world.counts.tell(worker)
        worker.reached("formed")
        worker.phase(RankPhase.RESTORING)
        feed = Feed(job, seat.cache_dir, worker.check)
        training = Training(
            job.trainer,
            job.config,
            feed.samples,
            world,
            empty=seat.restore is not None or job.has_begun,
            note=note,
            detection=job.detection,
            watched=seat.watched,
        )
        worker.on_fault(training.injected.take)
        stamp = stamp_of(seat.run_id, seat.generation, job, feed.samples)
        checkpointer = Checkpointer(
            training.optimizer.shards, world, stamp, within_s=seat.save_within_s
        )
        training.until_copied = until_copied(checkpointer, worker)
        if seat.restore is not None:
            done = restored(worker, seat.restore, checkpointer, feed, world)
            training.optimizer.set_steps(done)
        else:
            done = job.begin(training, stamp.start, worker.check)
        worker.reached("restored")
        try:
            cadence = worker.cadence or job.cadence
            steps = range(done + 1, job.trainer.steps + 1)
            with feed.ahead(steps, world.place, worker) as training.samples:
                for step in steps:
                    cadence = _step_and_save(training, checkpointer, worker, step, cadence)
                    feed.after(step, training, worker)
            training.look_at_the_end(job.trainer.steps, worker)
            _finish(checkpointer, worker, seat, job.trainer.steps, durable=world.replica == 0)
        finally:
            # Until the thread is done it writes to a slot that the next seat may name as free.
            checkpointer.settle()


def stamp_of(run_id: str, generation: Generation, job: Job, samples: Samples) -> Stamp:
    """Return what checkpoints of this generation belong to."""
    return Stamp(run_id, job.identity, generation, cursor_of(samples, job.trainer))


def _step_and_save(
    training: Training, checkpointer: Checkpointer, worker: Worker, step: int, cadence: Cadence
) -> Cadence:
    """Take a step and, if a save is due after it, save on every rank or on none.

    Ranks that skipped saves one by one could end with no step in common to continue from.

    Returns:
        How often to save from the next step on, the same on every rank: what rank 0 was told.
    """
    last = step == training.job.steps  # saved by _finish
    durable = step % cadence.durable == 0 and not last
    in_memory = step % cadence.memory == 0 and not last
    told = worker.cadence or cadence

    def say() -> Word:
        if not (durable or in_memory):
            return Word(memory=told.memory, durable=told.durable)
        worker.phase(RankPhase.CHECKPOINT)  # a slot that is used first is made first: be patient
        return Word(checkpointer.readiness(worker), told.memory, told.durable)

    words = training.step(step, worker, say)
    if durable or in_memory:
        answers = [word.ready for word in words]
        _save(checkpointer, worker, step, answers, durable=durable, in_memory=in_memory)
    return Cadence(words[0].memory, words[0].durable)


def _save(
    checkpointer: Checkpointer,
    worker: Worker,
    step: int,
    answers: list[int],
    *,
    durable: bool,
    in_memory: bool,
) -> None:
    """Save if all ranks can, to the durable tier if that is due and all can do that, too."""
    if min(answers) == Readiness.NOT:
        why = (
            "have no free slot (their shards are on the way to the buddy node or to the durable "
            "tier) or are still busy with the save before"
        )
        _say_unready(f"step {step} is not saved", answers, Readiness.NOT, why, worker)
        return
    if durable and min(answers) < Readiness.DURABLE:
        why = "have an older step on the way to the durable tier"
        _say_unready(f"step {step} is not made durable", answers, Readiness.MEMORY, why, worker)
        durable = False
    if durable or in_memory:
        worker.phase(RankPhase.CHECKPOINT)
        checkpointer.save(worker, step, durable=durable, overlap=True)


def until_copied(checkpointer: Checkpointer, worker: Worker) -> Callable[[], float]:
    """Return what waits until the save under way has its copy, as a phase of its own."""

    def wait() -> float:
        if not checkpointer.copying:
            return 0.0
        worker.phase(RankPhase.CHECKPOINT)
        seconds = checkpointer.await_copied(worker, alive)
        worker.phase(RankPhase.OPTIMIZER)
        return seconds

    def alive(pieces: int) -> None:
        # A rank whose copy gets on does not hang, however long that takes.
        if pieces:
            worker.phase(RankPhase.CHECKPOINT)
        else:
            worker.check()

    return wait


def _say_unready(
    what: str, answers: list[int], unready: Readiness, why: str, worker: Worker
) -> None:
    """Say in the log of rank 0 what comes to nothing, and because of whom."""
    if worker.seat is not None and worker.seat.rank == 0:
        ranks = [rank for rank, answer in enumerate(answers) if answer == unready]
        print(  # noqa: T201 - the rank's log
            f"{what}: {len(ranks)} of {len(answers)} ranks {why}, the first is rank {ranks[0]}",
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
    lanes = checkpointer.lanes(steps)
    checkpointer.settle()  # whoever hears that this rank is done has heard of its last save
    worker.finished(steps, lanes)


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
    open_data(trainer.data, tokenizer, ahead.cache_dir, check)


def _settle_heap() -> None:
    """Keep the collector away from the half million objects that torch is made of.

    Looking through them takes a tenth of a second, in the middle of a step or of a recovery, and
    in a forked process it copies every page that they lie on.
    """
    gc.collect()
    gc.freeze()


def main() -> int:
    """Serve as a supervised rank: the entrypoint that run files name by default."""
    return serve(train, rehearse, prepare)
