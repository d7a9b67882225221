"""The same trainer without an agent, in a plain torchrun world: what benchmarks compare with.

    torchrun --nproc-per-node 4 -m trainer.alone JOB.json --cache DIR [--save-every N --saves DIR]

Prints one line per step: `step N at SECONDS loss HEX took SECONDS`, on the clock of
`time.monotonic`. With `--save-every` it saves and continues through torch.distributed.checkpoint,
as a trainer does that restarts by `torchrun --max-restarts`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from orchestrator.protocol.layout import Layout
from trainer import parallel
from trainer.data import Samples, open_data
from trainer.feed import cursor_of
from trainer.job import read_job
from trainer.optim import STATES
from trainer.reporter import Unheard
from trainer.step import Training


class Printed(Unheard):
    """Reports steps on standard output."""

    def step_done(self, step: int, *, loss: float, seconds: float, **_: object) -> None:
        """Print a line that a benchmark can read."""
        print(  # noqa: T201 - it is what this program is for
            f"step {step} at {time.monotonic():.6f} loss {loss.hex()} took {seconds:.6f}",
            flush=True,
        )


def main() -> None:
    """Train the job that the command line names, from its newest save if there is one."""
    arguments = _arguments()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job = read_job(msgspec.json.decode(arguments.job.read_bytes()), size)
    with _world(job.trainer.device, job.layout) as world:
        sources = open_data(job.trainer.data, job.tokenizer, arguments.cache, lambda: None)
        samples = Samples(sources, job.trainer)
        training = Training(job.trainer, job.config, samples, world, empty=job.has_begun)
        done = _load(training, arguments.saves) if arguments.save_every else 0
        if not done:
            done = job.begin(training, cursor_of(samples, job.trainer), lambda: None)
        reporter = Printed() if rank == 0 else Unheard()
        for step in range(done + 1, job.trainer.steps + 1):
            training.step(step, reporter)
            if arguments.save_every and step % arguments.save_every == 0:
                save(_state(training), checkpoint_id=arguments.saves / f"step-{step:09d}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a job without supervision.")
    parser.add_argument("job", type=Path, help="`TrainingRun.job()` as JSON")
    parser.add_argument("--cache", default="", help="folder for tokens")
    parser.add_argument("--save-every", type=int, default=0, help="steps between saves; 0 for none")
    parser.add_argument("--saves", type=Path, default=Path("saves"), help="folder for saves")
    return parser.parse_args()


@contextlib.contextmanager
def _world(device: str, layout: Layout) -> Iterator[parallel.World]:
    store, rank, _ = next(rendezvous("env://"))
    # torchrun hands every attempt the same store, where addresses of the dead are still written.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    world = parallel.World(
        rank, layout, parallel.device_of(device, int(os.environ.get("LOCAL_RANK", "0")))
    )
    world.join(PrefixStore(f"attempt-{attempt}", store), timeout_s=600.0)
    yield world
    dist.barrier()
    dist.destroy_process_group()


def _state(training: Training) -> dict[str, Any]:
    """Return everything that is saved: the shards, as tensors that know the whole they are of."""
    state: dict[str, Any] = {}
    for s in training.optimizer.shards:
        for name, tensor in zip(STATES, s[2:], strict=True):
            assert isinstance(s.weight, DTensor)
            state[f"{name}/{s.name}"] = DTensor.from_local(
                tensor,
                s.weight.device_mesh,
                s.weight.placements,
                shape=s.weight.shape,
                stride=s.weight.stride(),
                run_check=False,
            )
    return state


def _load(training: Training, saves: Path) -> int:
    """Fill the state from the newest complete save; return its steps, 0 if there is none."""
    # The metadata is written last: a folder without it is of a save that was cut short.
    complete = sorted(path.parent for path in saves.glob("step-*/.metadata"))
    if not complete:
        return 0
    with torch.no_grad():
        load(_state(training), checkpoint_id=complete[-1])
    done = int(complete[-1].name.partition("-")[2])
    training.optimizer.set_steps(done)
    return done


if __name__ == "__main__":
    main()
