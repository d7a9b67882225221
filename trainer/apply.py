"""Makes of a plain model one that is trained in a world: in which order, and why in that one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.protocol import runfile
from trainer import parallel, pipeline, tensor
from trainer.context import Exchanging
from trainer.model import Block, Llama, next_token_loss
from trainer.reduction import keep_order

COMPILING: dict[str, Any] = {"fullgraph": True, "dynamic": False}
"""How layers are compiled. Kernels stay on the node (trainer.kernels), for later processes."""


def to_model(model: Llama, world: parallel.World, job: runfile.Trainer) -> list[nn.Module]:
    """Make of a whole model what this rank trains as the run file says; the model is used up.

    1. Stages of a pipeline, each of which goes through the rest by itself.
    2. Context parallelism, which changes how layers attend; tensor parallelism, which cuts weights.
    3. What is computed again in the backward pass, which is a matter of each layer.
    4. Compiling, layer by layer: all layers share one compiled graph, and so do the models of
       later generations in this process. What is computed again is part of it.
    5. Sharding last, around layers as they are by then: its collectives are not compiled. With
       deterministic reduction it is over one replica: `Reduction` adds up replicas.

    Returns:
        The model itself, or the stages of this rank.
    """
    layers = [layer for layer in model.layers if isinstance(layer, Block)]
    parts = _cut(model, world, job)
    for layer in layers:
        layer.recompute = job.activation_checkpointing
    if compiles(job, world.device):
        _choose_nothing_by_its_speed()
        for layer in layers:
            for module in _compiled_parts(layer, world.device):
                module.compile(**COMPILING)
    apart = job.reduction == "deterministic"
    for part in parts:
        parallel.shard(part, world, precision(job, world.device), apart=apart)
        if apart:
            keep_order(part, world.wait)
    return parts


def _cut(model: Llama, world: parallel.World, job: runfile.Trainer) -> list[nn.Module]:
    assert world.mesh is not None
    model.rotary.restarts = job.positions == "document"
    if world.context is not None:
        model.rotary.part, model.rotary.parts = world.position.cp, world.layout.cp
        for layer in model.layers:
            layer.attention.attend = Exchanging(world.context)  # type: ignore[union-attr]
    parts: list[nn.Module] = [model]
    if world.layout.pp > 1:
        parts = [*pipeline.cut(model, world, job, loss_function(job, world))]
    if world.layout.tp > 1:
        for part in parts:
            tensor.cut(part, world.mesh["tp"])
    return parts


def _choose_nothing_by_its_speed() -> None:
    """Have kernels with other last bits not be chosen by how fast they were just now.

    A process, or a node, that takes over has to compute what the one before it did.
    """
    inductor: Any = importlib.import_module("torch._inductor.config")
    if hasattr(inductor, "deterministic"):  # since torch 2.10
        inductor.deterministic = True


def _compiled_parts(layer: Block, device: torch.device) -> list[nn.Module]:
    if device.type == "cuda":
        return [layer]
    # On a CPU attention goes through documents one by one, and they are others in every batch.
    return [layer.attention_norm, layer.ffn_norm, layer.ffn]


def precision(job: runfile.Trainer, device: torch.device) -> torch.dtype:
    """Return the type in which layers compute: `auto` is float32 on a CPU, bfloat16 on a GPU."""
    wanted = job.precision
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def compiles(job: runfile.Trainer, device: torch.device) -> bool:
    """Return whether layers are compiled: on a GPU, unless the run file says otherwise."""
    return device.type == "cuda" if job.compile is None else job.compile


def loss_function(
    job: runfile.Trainer, world: parallel.World
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `next_token_loss`; compiled, it keeps no copy of the logits in float32."""
    if world.layout.tp > 1:
        return tensor.next_token_loss
    if world.device.type == "cuda" and compiles(job, world.device):
        return torch.compile(next_token_loss, **COMPILING)
    return next_token_loss
