"""What a job comes to in one rank, this process: what ranks that shared the work must come to."""

from typing import Any

from orchestrator.protocol.ids import Generation
from tests.programs.seated import Result
from trainer import parallel
from trainer.checkpoint import Checkpointer
from trainer.data import Samples, open_tokens
from trainer.job import read_job
from trainer.reporter import Unheard
from trainer.step import Training
from trainer.train import stamp_of


def one_rank(job: dict[str, Any]) -> Result:
    """Return what a job comes to in this process."""
    read = read_job(job, 1)
    tokens = open_tokens(None, read.tokenizer, "", lambda: None)
    losses: list[tuple[int, float]] = []

    class Recorder(Unheard):
        def step_done(self, step: int, *, loss: float, **_: object) -> None:
            losses.append((step, loss))

    with parallel.alone() as world:
        training = Training(read.trainer, read.config, Samples(tokens, read.trainer), world)
        for step in range(1, read.trainer.steps + 1):
            training.step(step, Recorder())
        stamp = stamp_of("run", Generation(1), read, Samples(tokens, read.trainer))
        lanes = Checkpointer(training.optimizer.shards, world, stamp).lanes(read.trainer.steps)
    return lanes, losses
