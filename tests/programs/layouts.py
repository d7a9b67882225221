"""Takes the same steps in worlds that are cut in different ways, one after the other.

    python -m tests.programs.layouts FOLDER LAYOUT...

A layout is JSON: sizes of the dimensions, and fields of `spec.trainer` that differ; with `plain`,
FSDP gathers and adds up in torch's own way, whatever the trainer would have it do. Every rank is
forked from here, takes part in the worlds that have a place for it, and leaves what it came to in
FOLDER/LAYOUT-RANK.npz.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from torch._C._distributed_c10d import FileStore, PrefixStore
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from orchestrator.protocol import runfile
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.sizes import ModelConfig
from trainer import parallel, train
from trainer.checkpoint import Checkpointer
from trainer.data import Samples
from trainer.evaluation import Held, evaluate
from trainer.reporter import Unheard
from trainer.stamp import Cursor, Stamp
from trainer.step import Training
from trainer.tokens import Tokens

CONFIG = ModelConfig(dim=32, layers=4, heads=8, kv_heads=4, ffn_dim=52, vocab=64)
IDS = np.random.default_rng(3).integers(0, 64, 2300).astype(np.uint32)
TOKENS = Tokens(IDS[:2000], "d16e57", 63, held=IDS[2000:])
STEPS = 3
CURSOR = Cursor(samples=0, seed=0, seq_len=16, global_batch=8, data="d16e57")


class Recorder(Unheard):
    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def step_done(self, step: int, *, loss: float, grad_norm: float, **_: object) -> None:
        self.steps.append((loss, grad_norm))


def trained(world: parallel.World, job: runfile.Trainer, *, plain: bool) -> dict[str, Any]:
    """Return steps, parts of weights with where they begin, and lanes."""
    training = Training(job, CONFIG, Samples(TOKENS, job), world)
    for module in training.stages[0].modules() if plain else ():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(DefaultAllGather())
            module.set_custom_reduce_scatter(DefaultReduceScatter())
    recorder = Recorder()
    for step in range(1, STEPS):
        training.step(step, recorder)
    parts: dict[str, Any] = {}
    parts["evaluated"] = np.array(evaluate(training, Held([TOKENS], job), Unheard()).loss)
    training.step(STEPS, recorder)  # as if nothing had happened
    parts["steps"] = np.array(recorder.steps)
    shards = training.optimizer.shards
    checkpointer = Checkpointer(shards, world, Stamp("run", CONFIG.fingerprint, 1, CURSOR))
    parts["lanes"] = np.array(checkpointer.lanes(STEPS), np.uint64)
    for chunk in checkpointer.chunks:
        parts[f"{chunk.state}/{chunk.fqn}@{','.join(map(str, chunk.offset))}"] = next(
            getattr(s, chunk.state) for s in shards if s.name == chunk.fqn
        ).numpy()
    return parts


def take_part(rank: int, folder: Path, layouts: list[str]) -> None:
    for number, text in enumerate(layouts):
        fields = json.loads(text)
        sizes = {name: fields.pop(name) for name in Layout._fields if name in fields}
        layout, plain = Layout(**sizes), fields.pop("plain", False)
        if rank >= layout.world_size:
            continue
        settings: dict[str, Any] = {"steps": 20, "seq_len": 16, "global_batch": 8, "micro_batch": 2}
        settings["batch_ramp"] = (runfile.BatchChange(tokens=2 * 8 * 16, global_batch=16),)
        settings["length_ramp"] = (runfile.LengthChange(tokens=2 * 8 * 16, seq_len=32),)
        job = runfile.Trainer(**{**settings, "warmup_steps": 2, "learning_rate": 0.01, **fields})
        world = parallel.World(rank, layout, parallel.device_of("cpu", 0))
        store = FileStore(str(folder / f"store-{number}"), layout.world_size)
        world.join(PrefixStore("world", store), 60.0)
        np.savez(folder / f"{number}-{rank}.npz", **trained(world, job, plain=plain))
        world.gather([0.0])  # nobody leaves while others still need it
        world.leave()


def main(folder: Path, layouts: list[str]) -> int:
    sizes = [{n: v for n, v in json.loads(t).items() if n in Layout._fields} for t in layouts]
    train.warm_up()
    children = []
    for rank in range(max(Layout(**each).world_size for each in sizes)):
        child = os.fork()
        if child == 0:
            try:
                take_part(rank, folder, layouts)
            except BaseException:  # noqa: BLE001 - the parent hears of it by the exit code
                traceback.print_exc()
                os._exit(1)
            # Groups that were left have threads: no destructor is to wait for them.
            os._exit(0)
        children.append(child)
    for _ in range(len(children)):
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:  # they wait for it
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
