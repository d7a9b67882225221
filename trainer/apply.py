"""Makes of a plain model one that is trained in a world: in which order, and why in that one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.protocol import runfile
from trainer import parallel
from trainer.model import Block, Llama, next_token_loss
from trainer.reduction import keep_order

COMPILING: dict[str, Any] = {
    "fullgraph": True,
    "dynamic": False,
    "backend": "inductor",
    # Nothing that moves the last bits is chosen by how fast it was just now: a process or a node
    # that takes over computes what the one before it did.
    "options": {"deterministic": True},
}
"""How layers are compiled. Kernels are kept on the node's disk, for processes to come."""


def to_model(model: Llama, world: parallel.World, job: runfile.Trainer) -> Llama:
    """Change the model in place into one that is trained as the run file says.

    1. What is computed again in the backward pass, which is a matter of each layer.
    2. Compiling, layer by layer: all layers share one compiled graph, and so do the models of
       later generations in this process. What is computed again is part of it.
    3. Sharding last, around layers as they are by then: its collectives are not compiled. With
       deterministic reduction it is over one replica: `Reduction` adds up replicas.
    """
    layers = [layer for layer in model.layers if isinstance(layer, Block)]
    for layer in layers:
        layer.recompute = job.activation_checkpointing
    model.restarts = job.positions == "document"
    if compiles(job, world.device):
        for layer in layers:
            for part in _compiled_parts(layer, world.device):
                part.compile(**COMPILING)
    apart = job.reduction == "deterministic"
    parallel.shard(model, world, precision(job, world.device), apart=apart)
    if apart:
        keep_order(model)
    return model


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


def loss_function(job: runfile.Trainer, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `next_token_loss`; compiled, it keeps no copy of the logits in float32."""
    if device.type == "cuda" and compiles(job, device):
        return torch.compile(next_token_loss, **COMPILING)
    return next_token_loss
