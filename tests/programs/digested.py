"""Takes some steps by itself and prints a digest of all that they come to, in the order of things.

    python -m tests.programs.digested DEVICE KERNELS STEPS

Two processes that print the same trained with the same bits; else the first line that differs says
which part of which step did: what a layer returns, the gradient that comes back to it, a weight's
gradient, or the weight after the optimizer. KERNELS is the folder of compiled kernels.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from orchestrator.protocol import runfile
from orchestrator.protocol.sizes import ModelConfig
from trainer import kernels, parallel
from trainer.data import Samples, Tokens
from trainer.reporter import Unheard
from trainer.step import Training

CONFIG = ModelConfig(dim=512, layers=3, heads=8, kv_heads=2, ffn_dim=1408, vocab=4096)
IDS = np.random.default_rng(3).integers(0, 4000, 40_000).astype(np.uint32)
IDS[np.random.default_rng(4).integers(0, len(IDS), 80)] = 4001
TOKENS = Tokens(IDS, "d16e57000000", 4001)


def say(step: int, what: str, name: str, tensor: Tensor) -> None:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    print(f"step {step} {what} {name} {xxhash.xxh3_64_hexdigest(raw.data)}")


class Watched(Unheard):
    """Knows which step it is, and has every layer's output and its gradient told."""

    def __init__(self, training: Training) -> None:
        self.step = 0
        (model,) = training.stages
        for name, part in model.named_modules():
            # A compiled layer is called by what compiling left: a hook would be compiled with it.
            layer = name.startswith("layers.") and name.count(".") == 1
            if layer or name in ("embedding", "norm"):
                self._watch(name, part)

    def _watch(self, name: str, part: nn.Module) -> None:
        called: Callable[..., Any] = part._compiled_call_impl or part._call_impl

        def told(*arguments: Any, **more: Any) -> Any:
            out = called(*arguments, **more)
            say(self.step, "forward", name, out)
            out.register_hook(lambda gradient: say(self.step, "backward", name, gradient))
            return out

        part._compiled_call_impl = told  # type: ignore[assignment]


def main(device: str, folder: str, steps: int) -> int:
    kernels.keep_in(folder)
    job = runfile.Trainer(
        steps=20, seq_len=512, global_batch=4, micro_batch=2, warmup_steps=1, device=device
    )
    with parallel.alone(device=device) as world:
        training = Training(job, CONFIG, Samples(TOKENS, job), world)
        watched = Watched(training)
        take = training.optimizer.set_gradients

        def taken(gradients: list[Tensor]) -> Tensor:
            for shard, gradient in zip(training.optimizer.shards, gradients, strict=True):
                say(watched.step, "gradient", shard.name, gradient)
            return take(gradients)

        training.optimizer.set_gradients = taken  # type: ignore[method-assign]
        for watched.step in range(1, steps + 1):
            training.step(watched.step, watched)
            for shard in training.optimizer.shards:
                say(watched.step, "weight", shard.name, shard.param)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
