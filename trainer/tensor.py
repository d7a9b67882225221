"""Tensor parallelism: each layer cut over the ranks of `tp`, and what lies between layers with it.

Queries, keys, values and the way into a feed-forward are cut by columns, the way out of either by
rows, so that a layer needs to gather what goes in and to add up what comes out, and no more.
Between layers, where norms and sums look at each position by itself, a rank has its part of the
sequence (sequence parallelism). The loss is computed from logits that stay cut by vocabulary.

Source: arXiv 2205.05198 for sequence parallelism; the plans are those of torch's own tutorial.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from trainer import model


def cut(part: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a model, or a stage of one, over the ranks of a mesh, in place; nobody is asked.

    Every rank has the same weights and keeps its part of them.

    Args:
        part: with `embedding`, `layers`, `norm` and `head`, of which a stage may lack the ends.
        mesh: of one dimension; heads, widths, vocabulary and sequence divide by its size.
    """
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        ),
    }
    there = dict(part.named_children())
    _apply(part, mesh, {name: style for name, style in ends.items() if name in there})
    for layer in there["layers"].children():
        _apply(layer, mesh, _layer_plan())
        attention = layer.get_submodule("attention")
        attention.heads //= mesh.size()  # type: ignore[operator, assignment]
        attention.kv_heads //= mesh.size()  # type: ignore[operator, assignment]


def losses(size: int) -> AbstractContextManager[None]:
    """Return a context in which losses of cut logits are computed, forward and backward."""
    return loss_parallel() if size > 1 else contextlib.nullcontext()


def next_token_loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Return `model.next_token_loss` of logits that are cut; every rank of `tp` has all of it."""
    loss = model.next_token_loss(logits_BLV, targets_BL)
    assert isinstance(loss, DTensor)
    # Not a view: FSDP warns of modules that return one.
    return loss.to_local().clone()


def cut_dimension(weight: Tensor) -> int | None:
    """Return the dimension over which a weight is cut between ranks of `tp`, if it is."""
    if isinstance(weight, DTensor):
        at = _dimension(weight.device_mesh)
        placement = None if at is None else weight.placements[at]
        if isinstance(placement, Shard):
            return placement.dim % weight.ndim
    return None


def speaks(weight: Tensor) -> bool:
    """Whether this rank's part of a weight counts: of one that all of `tp` have, the first's."""
    if not isinstance(weight, DTensor) or cut_dimension(weight) is not None:
        return True
    at = _dimension(weight.device_mesh)
    return at is None or weight.device_mesh.get_local_rank(at) == 0


def _dimension(mesh: DeviceMesh) -> int | None:
    names = [name.partition("@")[0] for name in mesh.mesh_dim_names or ()]
    return names.index("tp") if "tp" in names else None


def _layer_plan() -> dict[str, ParallelStyle]:
    gathered = PrepareModuleInput(
        input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
    )
    return {
        "attention_norm": SequenceParallel(),
        "attention": gathered,
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "ffn": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "ffn.w1": ColwiseParallel(),
        "ffn.w2": RowwiseParallel(output_layouts=Shard(1)),
        "ffn.w3": ColwiseParallel(),
    }


def _apply(module: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> None:
    # No source rank: weights are the same everywhere, and are cut where they are.
    parallelize_module(module, mesh, plan, src_data_rank=None)
