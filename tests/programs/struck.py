"""Trains a run of the embedded trainer, whose state all replicas come to hold wrong alike.

    python -m tests.programs.struck FOLDER

Reads FOLDER/run.json. After step SAVED, ranks of the first replica save to FOLDER/checkpoints. In
step STRUCK, right before it computes anything, the same bit flips on all ranks that hold shard
WRONG. Each rank leaves FOLDER/RANK.json: what it digested, by step, and the receipt of its shard.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import msgspec

from orchestrator.protocol.digests import KINDS, Kind, Taken
from orchestrator.protocol.ids import Generation
from orchestrator.protocol.rank import Misbehave
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worker import Slot
from storage.commit import write_shard
from storage.local import LocalStore
from storage.manifest import ShardReceipt
from storage.shard import decode_index
from tests.programs import forked
from trainer import parallel, train
from trainer.checkpoint import Checkpointer
from trainer.data import Samples, open_data
from trainer.job import read_job
from trainer.reporter import Unheard
from trainer.step import Training

STEPS, SAVED, STRUCK, WRONG = 10, 4, 8, 1
FLIP: dict[str, str | int | float] = {
    "state": "exp_avg",
    "tensor": "layers.0.ffn.w1.weight",
    "element": 5,
    "bit": 20,
    "atStep": STRUCK,
}


class Heard(Unheard):
    def __init__(self) -> None:
        self.digests: dict[int, list[int]] = {}

    def digested(self, taken: Taken, digests: dict[Kind, int]) -> None:
        assert taken.period == 1
        self.digests[taken.step] = [digests.get(kind, 0) for kind in KINDS]


class Keeper:
    """Writes what is staged to the durable tier at once."""

    persisting = False

    def __init__(self, folder: Path, rank: int) -> None:
        self._store, self._path = LocalStore(folder / "checkpoints"), folder / f"slot-{rank}"
        self.receipt: ShardReceipt | None = None

    def slot(self, size: int) -> Slot:
        return Slot(0, self._path, size)

    def staged(self, slot: Slot, *, generation: int, step: int, index: str, durable: bool) -> None:
        del generation, step, durable
        self.receipt = write_shard(self._store, decode_index(index.encode()), slot.buffer)

    def give_back(self, slot: Slot) -> None:
        raise AssertionError(slot.number)

    def abandoned(self, step: int, *, generation: int, reason: str) -> None:
        raise AssertionError(f"step {step} of generation {generation}: {reason}")

    def stalled(self, seconds: float) -> None:
        del seconds


def take_part(folder: Path, run: TrainingRun, world: parallel.World) -> dict[str, Any]:
    job = read_job(run.job(), run.world_size)
    sources = open_data(job.trainer.data, job.tokenizer, str(folder), lambda: None)
    samples = Samples(sources, job.trainer)
    training = Training(job.trainer, job.config, samples, world, detection=job.detection)
    stamp = train.stamp_of(run.metadata.name, Generation(1), job, samples)
    checkpointer = Checkpointer(training.optimizer.shards, world, stamp)
    heard, keeper = Heard(), Keeper(folder, world.rank)
    if world.shard == WRONG:
        training.injected.take(Misbehave(how="flip-bit", options=FLIP))
    for step in range(1, STEPS + 1):
        training.step(step, heard)
        if step == SAVED and world.replica == 0:
            assert checkpointer.save(keeper, step, durable=True)
            checkpointer.settle()
    return {"digests": heard.digests, "receipt": msgspec.to_builtins(keeper.receipt)}


def main(folder: Path) -> int:
    train.warm_up()
    run = msgspec.json.decode((folder / "run.json").read_bytes(), type=TrainingRun)
    return forked.conduct(folder, run.layout, functools.partial(take_part, folder, run))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
