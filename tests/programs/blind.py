"""Two replicas train while what looks for wrong state raises on one of them, in each of some ways.

Prints a line of JSON per rank and way: losses of all steps as exact text, which detectors were said
to be off, and what else was found. Arguments: rank, file to meet in.
"""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.distributed import FileStore

from orchestrator.protocol import runfile
from orchestrator.protocol.layout import Layout
from trainer import digest, gradients, parallel, readings, watch
from trainer.config import ModelConfig
from trainer.data import Batch, Samples, Tokens
from trainer.reporter import Unheard
from trainer.step import Training

STEPS, WRONG_STEP, BLIND = 5, 3, 1
CONFIG = ModelConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=16, vocab=16)
TOKENS = Tokens(np.arange(512, dtype=np.uint32) * 7 % 16, "d16e57000000", 15)
JOB = runfile.Trainer(steps=STEPS, seq_len=8, global_batch=4, warmup_steps=1, micro_batch=1)
NUMBERS = itertools.count(1)


class Heard(Unheard):
    def __init__(self) -> None:
        self.losses: list[str] = []
        self.off: list[tuple[str, str]] = []
        self.diverged_at: list[int] = []

    def detector_failed(self, detector: str, reason: str) -> None:
        self.off.append((detector, reason))

    def diverged(self, step: int, **_: object) -> None:
        self.diverged_at.append(step)

    def step_done(self, step: int, *, loss: float, grad_norm: float, **_: object) -> None:
        self.losses.append(f"{step} {loss.hex()} {grad_norm.hex()}")


class Unreadable:
    """Samples that a rank can not read once more."""

    mark = 0.0

    def batch(self, step: int, indices: range) -> Batch:
        raise OSError(f"no samples {indices} of step {step}")


def raising(*_: object, **__: object) -> Any:
    raise RuntimeError("no digest today")


def other_each_time(*args: Any) -> torch.Tensor:
    return digest.digest(*args) + next(NUMBERS)


def spoil(how: str, training: Training) -> Any:
    """Return what makes the detectors of this rank raise for the time that it is entered."""
    match how:
        case "watch":
            return mock.patch.object(watch, "digest", raising)
        case "replay":
            return mock.patch.object(gradients, "digest", raising)
        case "chance":
            return mock.patch.object(gradients, "digest", other_each_time)
        case "samples":
            training._replays.readings.forget()  # those of this step were read before
            return mock.patch.object(training._replays.ring, "samples", Unreadable())
        case _:
            return mock.patch.object(digest, "digest", digest.digest)


def train(how: str, world: parallel.World) -> Heard:
    training = Training(
        JOB,
        CONFIG,
        Samples(TOKENS, JOB),
        world,
        detection=runfile.Detection(digest_share=1.0, replay_share=1.0),
    )
    heard = Heard()
    for step in range(1, STEPS + 1):
        wrong = step == WRONG_STEP and (world.rank == BLIND or how == "chance")
        with spoil(how if wrong else "", training):
            training.step(step, heard)
    training.look_at_the_end(STEPS, heard)
    return heard


def main(rank: int, meeting: str, ways: Sequence[str]) -> None:
    readings.WITHIN_S = 60.0  # how busy the machine is does not matter here
    torch.set_num_threads(1)
    world = parallel.World(rank, Layout(dp_replicate=2), parallel.device_of("cpu", 0))
    world.join(FileStore(meeting, 2), 60.0)
    say: Callable[..., object] = print
    for way in ways:
        say(json.dumps({"way": way, **vars(train(way, world))}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], ("sound", "watch", "replay", "samples", "chance"))
