"""Weights as they lie somewhere, under our names: read in any box, and checked as they are read.

A weight is made of boxes, since a release may be cut for tensor parallelism and a checkpoint is
cut into shards. Nothing is read before somebody asks, and then only the rows that it takes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from orchestrator.worker import MisconfiguredError
from trainer.config import ModelConfig
from trainer.weights import names
from trainer.weights.names import Shape

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""By the names of safetensors; nothing else is a weight."""


class Piece(Protocol):
    """Some box of a weight, wherever it lies."""

    @property
    def shape(self) -> Shape:
        """Its own."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its items."""

    def rows(self, first: int, count: int) -> Tensor:
        """Read these rows. Raises MisconfiguredError if they are not what was written."""


class Box(NamedTuple):
    """A piece, and where in its weight it begins."""

    offset: Shape
    piece: Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One weight.

    Attributes:
        boxes: which make it up without gaps.
        turned_rows: rows of a head if the halves of heads are turned against each other, else 0.
        called: what it is called where it lies, for messages.
    """

    shape: Shape
    boxes: tuple[Box, ...]
    turned_rows: int = 0
    called: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Of its items, as they lie there."""
        return self.boxes[0].piece.dtype

    def read(self, offset: Shape, shape: Shape) -> Tensor:
        """Return a box of it in our order of rows, as a tensor of its own memory."""
        first, count = offset[0], shape[0]
        step = self.turned_rows or 1
        begin, end = first // step * step, -(-(first + count) // step) * step
        rows = self._assemble((begin, *offset[1:]), (end - begin, *shape[1:]))
        if self.turned_rows and len(rows):
            rows = neighbours(rows, self.turned_rows)[first - begin :][:count]
        return rows

    def _assemble(self, offset: Shape, shape: Shape) -> Tensor:
        whole = torch.empty(shape, dtype=self.dtype)
        filled = 0
        for box in self.boxes:
            pairs = list(zip(box.offset, box.piece.shape, offset, shape, strict=True))
            starts = [max(at, wanted) for at, _, wanted, _ in pairs]
            ends = [min(at + size, wanted + count) for at, size, wanted, count in pairs]
            if any(a >= b for a, b in zip(starts, ends, strict=True)):
                continue
            part = box.piece.rows(starts[0] - box.offset[0], ends[0] - starts[0])
            for dim in range(1, len(shape)):
                part = part.narrow(dim, starts[dim] - box.offset[dim], ends[dim] - starts[dim])
            if part.shape == whole.shape and part.is_contiguous():
                return part
            target = whole
            for dim in range(len(shape)):
                target = target.narrow(dim, starts[dim] - offset[dim], ends[dim] - starts[dim])
            target.copy_(part)
            filled += part.numel()
        assert filled == whole.numel(), (offset, shape, self.shape)
        return whole


class Weights:
    """All weights of one model, somewhere.

    Attributes:
        config: the sizes that they say they are of.
        layout: in words.
        where: their address.
        digest: 64 hex digits that change if they do, as far as can be told without reading all.
        tied: whether head and embedding are one there.
    """

    def __init__(
        self,
        config: ModelConfig,
        stored: Mapping[str, Stored],
        *,
        layout: str,
        where: str,
        digest: str,
        tied: bool = False,
    ) -> None:
        self.config, self.stored = config, dict(stored)
        self.layout, self.where, self.digest, self.tied = layout, where, digest, tied

    def read(self, name: str, offset: Shape | None = None, shape: Shape | None = None) -> Tensor:
        """Return a weight in its own type, or a box of it, in memory of its own.

        Raises:
            MisconfiguredError: if it holds what is no finite number, or is not what was written.
        """
        stored = self.stored[name]
        begin = offset or (0,) * len(stored.shape)
        tensor = stored.read(begin, stored.shape if shape is None else shape)
        require_finite(tensor, f"{stored.called or name}: {self.where}")
        return tensor

    @property
    def parameters(self) -> int:
        """Numbers that lie there; a head that is the embedding counts once."""
        sizes = {name: math.prod(stored.shape) for name, stored in self.stored.items()}
        return sum(size for name, size in sizes.items() if not (self.tied and name == names.HEAD))

    def require(self, config: ModelConfig) -> None:
        """Check that they are of this model.

        Raises:
            MisconfiguredError: naming the first weight of another shape, with both shapes, or what
                else of the two differs.
        """
        hint = f"the weights are of {describe(self.config)}: give `spec.trainer.model` these sizes"
        for name, shape in names.shapes(config):
            found = self.stored.get(name)
            if found is None or found.shape != shape:
                what = "not there" if found is None else f"of shape {list(found.shape)}"
                raise MisconfiguredError(
                    f"{name} is {what}, expected {list(shape)}: {self.where}", hint=hint
                )
        for field in ModelConfig.__struct_fields__:
            if field == "max_length":
                continue  # weights may go on to longer sequences than they have seen
            found, expected = getattr(self.config, field), getattr(config, field)
            if found != expected:
                raise MisconfiguredError(
                    f"{field} of the weights is {found}, expected {expected}: {self.where}",
                    hint=hint,
                )

    @torch.no_grad()
    def fill(
        self,
        params: Iterable[tuple[str, nn.Parameter, Tensor]],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Fill this rank's parts of weights, reading nothing else.

        Args:
            params: name, weight as the model has it, and the local part of it to fill.
            check: called before each; may raise.

        Raises:
            MisconfiguredError: as `read`.
        """
        for name, weight, param in params:
            check()
            offset, shape = _box_of(weight)
            if math.prod(shape):
                param.copy_(self.read(name, offset, shape))


class _Mean:
    """The mean of the same weight in several places, as a piece of a weight."""

    def __init__(self, several: Sequence[Stored]) -> None:
        self._several = several
        self.shape, self.dtype = several[0].shape, several[0].dtype

    def rows(self, first: int, count: int) -> Tensor:
        """Read these rows of all, one after the other, and add them up in float64."""
        offset = (first, *(0,) * (len(self.shape) - 1))
        total = torch.zeros((count, *self.shape[1:]), dtype=torch.float64)
        for stored in self._several:
            total += stored.read(offset, tuple(total.shape))
        return (total / len(self._several)).to(self.dtype)


def mean(several: Sequence[Weights]) -> Weights:
    """Return weights each of which is the mean of those in several places, made as they are read.

    Raises:
        MisconfiguredError: if they are not of the same sizes.
    """
    first = several[0]
    for other in several[1:]:
        other.require(first.config)
    stored = {
        name: Stored(
            shape=found.shape,
            boxes=(Box((0,) * len(found.shape), _Mean([w.stored[name] for w in several])),),
            called=name,
        )
        for name, found in first.stored.items()
    }
    return Weights(
        first.config,
        stored,
        layout=f"mean of {len(several)}",
        where=", ".join(weights.where for weights in several),
        digest=hashlib.sha256(" ".join(weights.digest for weights in several).encode()).hexdigest(),
    )


def neighbours(rows: Tensor, head: int) -> Tensor:
    """Reorder rows of heads from halves (Hugging Face) to neighbouring pairs (ours and Meta's).

    Args:
        rows: shape [heads x head, D] or so: the first dimension counts.
        head: rows of one head.
    """
    split = rows.reshape(-1, 2, head // 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)


def halves(rows: Tensor, head: int) -> Tensor:
    """Undo `neighbours`."""
    split = rows.reshape(-1, head // 2, 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise MisconfiguredError if there is a NaN or an infinity, saying how many and where."""
    # The least and the largest of a sound tensor are finite, and need no memory to be found.
    if not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax()):
        return
    bad = ~torch.isfinite(tensor)
    raise MisconfiguredError(
        f"{int(bad.sum())} of {tensor.numel()} values are NaN or infinite, the first is number "
        f"{int(bad.flatten().int().argmax())}: {what}",
        hint="the weights are damaged, or were converted to a type too small for them",
    )


def describe(config: ModelConfig) -> str:
    """Return sizes in the words of a run file."""
    sizes = (
        f"dim {config.dim}, layers {config.layers}, heads {config.heads}, "
        f"kvHeads {config.kv_heads}, ffnDim {config.ffn_dim}, vocab {config.vocab}, "
        f"ropeTheta {config.rope_theta:g}, normEps {config.norm_eps:g}"
    )
    if (s := config.rope_scaling) is None:
        return sizes
    return (
        f"{sizes}, ropeScaling (factor {s.factor:g}, lowFreqFactor {s.low_freq_factor:g}, "
        f"highFreqFactor {s.high_freq_factor:g}, originalLength {s.original_length})"
    )


def _box_of(weight: nn.Parameter) -> tuple[Shape, Shape]:
    """Return offset and shape of this rank's part of a weight."""
    if not isinstance(weight, DTensor):
        return (0,) * weight.ndim, tuple(weight.shape)
    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return tuple(offset), tuple(shape)
