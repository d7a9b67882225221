"""Replicas compute each other's micro-batches in every step, on GPUs if they are told to.

    python -m tests.programs.replayed FOLDER DEVICE REPLICAS

Each rank leaves FOLDER/RANK.json: in which steps it came to what another one had, which detectors
were said to be off and why, which steps were thrown away, and who was said to be wrong.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.protocol import runfile
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.sizes import ModelConfig
from tests.programs import forked
from tests.programs.doubted import UNKNOWN, Heard
from trainer import parallel, train
from trainer.data import Samples, Tokens
from trainer.step import Training

STEPS = 6
CONFIG = ModelConfig(dim=128, layers=2, heads=2, kv_heads=1, ffn_dim=256, vocab=256)
TOKENS = Tokens(np.arange(8192, dtype=np.uint32) * 7 % 250, "d16e57000000", 255)


def taken(world: parallel.World) -> dict[str, Any]:
    device = world.device.type
    job = runfile.Trainer(
        steps=STEPS, seq_len=128, global_batch=2 * world.size, micro_batch=1, device=device
    )
    training = Training(job, CONFIG, Samples(TOKENS, job), world, detection=UNKNOWN)
    heard = Heard()
    for step in range(1, STEPS + 1):
        training.step(step, heard)
    return vars(heard)


def main(folder: Path, device: str, replicas: int) -> int:
    train.warm_up()
    return forked.conduct(folder, Layout(dp_replicate=replicas), taken, device)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
