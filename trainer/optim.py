"""How weights move: AdamW over this rank's shards, warm-up and cosine, clipping by global norm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from orchestrator.protocol import runfile
from trainer.tensor import speaks

BETAS = (0.9, 0.95)
EPSILON = 1e-8
FINAL_SHARE = 0.01
"""The last step's share of the highest learning rate. Source: Llama 3, 8e-5 to 8e-7."""
STATES = ("param", "exp_avg", "exp_avg_sq")
"""What a weight's state consists of, as named in checkpoints."""


class ShardState(NamedTuple):
    """This rank's part of one weight, and of what the optimizer remembers of it."""

    name: str
    weight: nn.Parameter
    """As the model has it, with its gradient."""
    param: Tensor
    """Its local part; the same memory."""
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def counts(self) -> bool:
        """Whether it is counted here; of weights that all ranks of `tp` have, the first's are."""
        return speaks(self.weight)


def learning_rate(step: int, job: runfile.Trainer) -> float:
    """Return the learning rate of `step` (1-based): up in a line, then down along a cosine.

    The last `annealSteps` go down in a line from where the cosine has come, to nothing.
    """
    annealed = job.steps - job.anneal_steps
    if job.anneal_steps and step > annealed:
        left = (job.steps - step) / job.anneal_steps
        return left * (learning_rate(annealed, job) if annealed > 0 else job.learning_rate)
    if step <= job.warmup_steps:
        return job.learning_rate * step / job.warmup_steps
    done = (step - job.warmup_steps) / max(job.steps - job.warmup_steps, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return job.learning_rate * (FINAL_SHARE + (1.0 - FINAL_SHARE) * cosine)


class Part(NamedTuple):
    """Some numbers of one weight: its values, gradient and moments, of one shape."""

    name: str
    decays: bool
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Optimizer:
    """AdamW on the local shards, as plain tensors: no collective is hidden in it.

    torch's own, in its `fused` form on a GPU and in its `foreach` form on a CPU: its forms differ
    in their last bits, and torch would choose by itself. Vectors (gains of norms) do not decay.
    """

    def __init__(self, parts: Iterable[nn.Module], job: runfile.Trainer) -> None:
        self._job = job
        weights = itertools.chain.from_iterable(part.named_parameters() for part in parts)
        self.shards = [_shard_state(name, weight) for name, weight in weights]
        self._device = self.shards[0].param.device
        self._fused = self._device.type == "cuda"
        matrices = [shard for shard in self.shards if shard.weight.ndim > 1]
        vectors = [shard for shard in self.shards if shard.weight.ndim <= 1]
        self._adamw = torch.optim.AdamW(
            [
                {"params": [s.param for s in matrices], "weight_decay": job.weight_decay},
                {"params": [s.param for s in vectors], "weight_decay": 0.0},
            ],
            lr=job.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            **{"fused" if self._fused else "foreach": True},
        )
        self.set_steps(0)

    def set_steps(self, steps: int) -> None:
        """Let the optimizer know how many steps lie behind the state of its shards."""
        for shard in self.shards:
            self._adamw.state[shard.param] = {
                "step": torch.tensor(float(steps), device=self._device),
                "exp_avg": shard.exp_avg,
                "exp_avg_sq": shard.exp_avg_sq,
            }

    @torch.no_grad()
    def take_gradients(self) -> list[Tensor]:
        """Take the gradients out of the model; return this rank's part of each, not copied."""
        gradients = []
        for shard in self.shards:
            gradient = shard.weight.grad
            assert gradient is not None, f"no gradient for {shard.name}"
            gradients.append(local(gradient))
            shard.weight.grad = None
        return gradients

    @torch.no_grad()
    def set_gradients(self, gradients: list[Tensor]) -> Tensor:
        """Let the shards have their gradients, for `step`; return the sum of squares that count.

        float64, a scalar, on the device: nobody has waited for it.
        """
        for shard, gradient in zip(self.shards, gradients, strict=True):
            shard.param.grad = gradient
        counted = [g for s, g in zip(self.shards, gradients, strict=True) if s.counts]
        norm = nn.utils.get_total_norm(counted, foreach=True)
        return norm.double().square()

    @torch.no_grad()
    def step(self, step: int, grad_norm: float) -> None:
        """Move the weights, for the step of this number (1-based), given the global norm."""
        self._clip([shard.param for shard in self.shards], grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate(step, self._job)
        self._adamw.step()

    @torch.no_grad()
    def update(self, parts: Sequence[Part], step: int, grad_norm: float) -> None:
        """Move parts of weights that are kept elsewhere, in place, to the bit as `step` does.

        Args:
            parts: with the gradient that the step was given, which is clipped here, too.
            step: its number.
            grad_norm: as there.
        """
        for decays in (True, False):
            some = [part for part in parts if part.decays is decays]
            if not some:
                continue
            params = [part.param for part in some]
            for part in some:
                part.param.grad = part.grad
            self._clip(params, grad_norm)
            adamw(
                params,
                [part.grad for part in some],
                [part.exp_avg for part in some],
                [part.exp_avg_sq for part in some],
                [],
                [torch.tensor(float(step - 1), device=self._device) for _ in some],
                foreach=not self._fused,
                fused=self._fused,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=learning_rate(step, self._job),
                weight_decay=self._job.weight_decay if decays else 0.0,
                eps=EPSILON,
                maximize=False,
            )

    def _clip(self, params: list[Tensor], grad_norm: float) -> None:
        norm = torch.tensor(grad_norm, dtype=torch.float32)
        if not self._job.clip_norm / (norm + 1e-6) >= 1.0:  # else it would multiply all by 1
            nn.utils.clip_grads_with_norm_(
                params,
                self._job.clip_norm,
                norm.to(self._device, non_blocking=True),
                foreach=True,
            )


def global_norm(squares: Iterable[float]) -> float:
    """Return the norm of all gradients from the sums of squares of every shard.

    `math.fsum` rounds once, so the order of the shards does not matter.
    """
    return math.sqrt(math.fsum(squares))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor; of one that is not sharded, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _shard_state(name: str, weight: nn.Parameter) -> ShardState:
    param = local(weight).detach()
    return ShardState(name, weight, param, torch.zeros_like(param), torch.zeros_like(param))
