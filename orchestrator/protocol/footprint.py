"""What a rank of the embedded trainer holds in memory, in bytes, before anything is started.

Everything is the worst rank's: the first of its shards, in the pipeline stage that needs most. What
lasts (weights, gradients, optimizer, checkpoint) is exact. Activations are those that the backward
pass keeps when layers are not compiled, counted by tensor; compiling keeps less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from orchestrator.protocol.cutting import stages, stages_per_rank
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.ramp import Ramp, at_stage
from orchestrator.protocol.runfile import Trainer
from orchestrator.protocol.sizes import ModelConfig, Shape, cut_dimension, weight_shapes

MASTER = 4
"""Bytes of a weight, of its gradient, and of each of the optimizer's two averages: float32."""
STATE = 3 * MASTER
"""Bytes of a weight in a checkpoint: itself and the two averages."""
GATHERED_LAYERS = 2
"""Layers that are whole at once, the one that computes and the next."""
GROUP_MIN = 4_000_000
"""Parameters from which a layer is gathered by itself; smaller ones are all gathered together.
`trainer.parallel.SHARD_PARAMETERS_MIN`."""


class Footprint(NamedTuple):
    """Bytes of the worst rank, by what they are for."""

    parameters: int
    """Not bytes: weights of which this rank has the master copy."""
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """Weights of other ranks while layers compute with them, and gradients on the way to them."""
    accumulated: int
    """Gradients that are added up over micro-batches: of whole layers, before ranks exchange them;
    with deterministic reduction of this rank's shard, in several sums."""
    activations: int
    """What layers keep of the forward pass."""
    recomputed: int
    """What the one layer has that is computed again."""
    logits: int
    """What the loss keeps, and its gradient."""
    checkpoint: int
    """A copy of the state, in the node's memory and not the GPU's."""

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(self) - self.parameters - self.checkpoint


def footprint(model: ModelConfig, job: Trainer, layout: Layout, *, compute: int) -> Footprint:
    """Return what the worst rank of a layout holds.

    Args:
        model: sizes.
        job: sequence length, batch, and what is computed again.
        layout: one into which the model can be cut (protocol.cutting).
        compute: bytes of a number that layers compute with: 2 for bf16, 4 for fp32.
    """
    ranks = [
        of_stage(model, then, layout, rank, compute)
        for then in stage_jobs(job, layout)
        for rank in range(layout.pp)
    ]
    return max(ranks, key=lambda found: found.total)


def stage_jobs(job: Trainer, layout: Layout) -> list[Trainer]:
    """Return a job as it is in each of its stages, with `micro_batch` written out."""
    first, _ = micro_batches(job, layout)
    whole = msgspec.structs.replace(job, micro_batch=first)
    return [at_stage(whole, stage) for stage in Ramp.of(job).stages]


def of_stage(
    model: ModelConfig, job: Trainer, layout: Layout, rank: int, compute: int
) -> Footprint:
    """Return what the first shard holds of the stages that a rank of the pipeline has."""
    parts = [range(model.layers)]
    if layout.pp > 1:
        parts = stages(model.layers, layout.pp * stages_per_rank(job))[rank :: layout.pp]
    layers = [layer for part in parts for layer in part]
    first, last = rank == 0, rank == layout.pp - 1
    mine = [
        (name, _of_tensor_rank(name, shape, layout.tp))
        for name, shape in weight_shapes(model)
        if _is_of(name, set(layers), first=first, last=last)
    ]
    shards = layout.dp_shard * layout.cp
    held = sum(-(-shape[0] // shards) * math.prod(shape[1:]) for _, shape in mine)
    whole = sum(math.prod(shape) for _, shape in mine)
    micro, count = micro_batches(job, layout)
    tokens = micro * job.seq_len // layout.cp
    fixed = job.reduction == "deterministic"
    return Footprint(
        parameters=held,
        weights=MASTER * held,
        gradients=MASTER * held,
        optimizer=2 * MASTER * held,
        gathered=_gathered(
            mine, shards, compute, stays=layout.pp > 1, exchanged=fixed or count == 1
        ),
        # In a fixed order: this rank's part of a sum for each level of the tree.
        accumulated=MASTER * (held * count.bit_length() if fixed else whole) if count > 1 else 0,
        activations=_activations(model, job, layout, tokens, len(layers), compute)
        * _in_flight(job, layout, rank, count),
        recomputed=_recomputed(model, job, layout, tokens, compute),
        logits=_logits(model, layout, tokens, compute) if last else 0,
        checkpoint=STATE * held,
    )


def micro_batches(job: Trainer, layout: Layout) -> tuple[int, int]:
    """Return the samples of a micro-batch, and how many of them a rank has in a batch."""
    share = job.global_batch // layout.readers
    micro = job.micro_batch or (1 if job.reduction == "deterministic" else share)
    return micro, max(share // micro, 1)


def _is_of(name: str, layers: set[int], *, first: bool, last: bool) -> bool:
    if name.startswith("layers."):
        return int(name.split(".")[1]) in layers
    return first if name.startswith("embedding") else last


def _of_tensor_rank(name: str, shape: Shape, tp: int) -> Shape:
    dim = cut_dimension(name)
    return tuple(size // tp if d == dim else size for d, size in enumerate(shape))


def _gathered(
    mine: list[tuple[str, Shape]], shards: int, compute: int, *, stays: bool, exchanged: bool
) -> int:
    """Return the bytes of weights that are there whole, and of gradients before their exchange.

    Args:
        mine: the weights of this rank's stages.
        shards: into how many they are cut.
        compute: bytes of a number that layers compute with.
        stays: whether they are kept whole for all of a step, as stages of a pipeline are.
        exchanged: whether each micro-batch's gradients are exchanged.
    """
    of_layers: dict[str, int] = {}
    for name, shape in mine:
        group = name.split(".")[1] if name.startswith("layers.") else ""
        of_layers[group] = of_layers.get(group, 0) + math.prod(shape)
    if shards == 1:
        # Nothing is gathered, but layers see a copy in their own type, and it is kept.
        return compute * sum(of_layers.values()) if compute != MASTER else 0
    ends = of_layers.pop("", 0)
    layer = max(of_layers.values(), default=0)
    if layer < GROUP_MIN:
        ends, layer = ends + sum(of_layers.values()), 0
    layers = len(of_layers) if stays else min(GATHERED_LAYERS, len(of_layers))
    weights = compute * (ends + layers * layer)
    if not exchanged:
        return weights
    # Of embedding and head they wait for the end of the pass; one group at a time is exchanged.
    return weights + compute * (ends + layer) + MASTER * max(ends, layer)


def _in_flight(job: Trainer, layout: Layout, rank: int, micro_batches: int) -> int:
    """Return for how many micro-batches a rank keeps activations at once, per stage of its own."""
    if layout.pp == 1:
        return 1
    own = stages_per_rank(job)
    warm_up = layout.pp - rank if own == 1 else (own - 1) * layout.pp + 2 * (layout.pp - rank) - 1
    return min(-(-warm_up // own), micro_batches)


class _Kept(NamedTuple):
    """Numbers that a layer keeps for each token, by the type that they are in."""

    master: int
    computed: int

    def bytes(self, compute: int) -> int:
        return MASTER * self.master + compute * self.computed


def _norm(model: ModelConfig, tp: int, compute: int) -> _Kept:
    """Return what a norm keeps: what comes in, in float32; before and after its gain."""
    dim = model.dim
    # What the products after it take is gathered from all of `tp`, and kept so.
    kept = _Kept(dim // tp + 1, dim // tp + dim)
    return kept if compute != MASTER else _Kept(1, kept.master - 1 + kept.computed)


def _attention(model: ModelConfig, tp: int) -> _Kept:
    """Return queries, keys, values, what comes of them, its copy for the product, and sums."""
    dim, keys = model.dim, model.kv_heads * model.head_dim
    return _Kept(model.heads // tp, 3 * dim // tp + 2 * keys // tp)


def _feed_forward(model: ModelConfig, tp: int) -> _Kept:
    """Return both ways in, the gate, and their product."""
    return _Kept(0, 4 * model.ffn_dim // tp)


def _layer(model: ModelConfig, layout: Layout, kept: str, compute: int) -> int:
    """Return the bytes that a layer keeps for each token."""
    dim, tp = model.dim, layout.tp
    norm = _norm(model, tp, compute).bytes(compute)
    attention = norm + _attention(model, tp).bytes(compute)
    match kept:
        case "full":
            return compute * dim // tp
        case "selective":
            return attention + compute * dim // tp
        case _:
            return attention + norm + _feed_forward(model, tp).bytes(compute)


def _activations(
    model: ModelConfig, job: Trainer, layout: Layout, tokens: int, layers: int, compute: int
) -> int:
    return tokens * layers * _layer(model, layout, job.activation_checkpointing, compute)


def _recomputed(model: ModelConfig, job: Trainer, layout: Layout, tokens: int, compute: int) -> int:
    """Return what is there of the one layer that is computed again."""
    if job.activation_checkpointing == "none":
        return 0
    whole = _layer(model, layout, "none", compute)
    return tokens * (whole - _layer(model, layout, job.activation_checkpointing, compute))


def _logits(model: ModelConfig, layout: Layout, tokens: int, compute: int) -> int:
    """Return what the last norm and the loss keep, and the gradient that they begin with."""
    norm = _norm(model, layout.tp, compute).bytes(compute)
    each = model.vocab // layout.tp
    return tokens * (norm + each * (2 * MASTER + (compute if compute != MASTER else 0)))


def assumptions(compute: int) -> Iterator[str]:
    """Yield what the numbers rest on, in words."""
    yield (
        f"layers compute in {'bf16' if compute == 2 else 'fp32'}; weights, gradients and the "
        "optimizer's two averages are float32 (4 + 4 + 8 bytes a weight), a checkpoint has 12"
    )
    yield "the worst rank: the first shard of the pipeline stage that holds most"
    yield (
        f"gathered: weights of embedding, head and {GATHERED_LAYERS} layers, and gradients of one, "
        "before they are exchanged; of a rank that has all of the model, its copy in bf16; of a "
        "pipeline, all of a rank's stages"
    )
    yield (
        "accumulated: with several micro-batches, gradients of whole layers in float32, or a few "
        "sums of this rank's with deterministic reduction"
    )
    yield "of the stage of batchRamp and lengthRamp that needs most"
    yield (
        "activations are counted tensor by tensor, as kept without compiling; a pipeline keeps "
        "them for as many micro-batches as are under way (1F1B)"
    )
    yield "not counted: buffers of collectives, work space of kernels, fragments"
