"""Pipeline parallelism: a model cut by layers into stages, and micro-batches that go through them.

Stage s is on rank s mod pp of its pipeline: with `1F1B` each rank has one, with `interleaved`
several, which makes the pipeline fill and drain faster for more messages. Ranks of a pipeline work
on the same samples: the first stage reads the tokens, the last one the targets, and every stage the
borders of documents. Names of weights are those of the whole model.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)

from orchestrator.protocol import runfile
from orchestrator.protocol.cutting import stages, stages_per_rank
from orchestrator.worker import RankPhase
from trainer.documents import Cuts, looking
from trainer.model import Llama
from trainer.parallel import World
from trainer.tracing import Trace

Purpose: TypeAlias = Literal["train", "replay", "look"]
Announce = Callable[[RankPhase, int], None]
"""Hears what a rank does from now on, and with which micro-batch."""


class Micro(NamedTuple):
    """One micro-batch of B samples of length L."""

    inputs: Tensor
    """Token ids, shape [B, L]."""
    targets: Tensor
    """The tokens that follow, shape [B, L]."""
    cuts: Cuts
    """As in `Llama.forward`."""

    @property
    def length(self) -> int:
        """Tokens of whole samples."""
        return self.cuts[0][-1]


# It prints the whole schedule when an operation fails, and that a peer is gone is told elsewhere.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
Loss = Callable[[Tensor, Tensor], Tensor]


class Stage(nn.Module):
    """Some layers of a model, with the embedding if they are the first, and the head if the last.

    Attributes:
        micro: what is computed next.
        trace: looks at that, if somebody does.

    Args:
        model: gives up what the stage is made of.
        index: which stage.
        layers: of each stage.
        loss: as `next_token_loss`.
    """

    def __init__(self, model: Llama, index: int, layers: list[range], loss: Loss) -> None:
        super().__init__()
        self.config, self.index = model.config, index
        self.rotary, self.loss = model.rotary, loss
        self.micro: Micro | None = None
        self.trace: Trace | None = None
        self.first, self.last = index == 0, index == len(layers) - 1
        if self.first:
            self.embedding = model.embedding
        self.layers = nn.ModuleList()
        for layer in layers[index]:
            self.layers.add_module(str(layer), model.layers[layer])
        if self.last:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        """Return what goes to the next stage, [B, L, D]; of the last one the sum of losses.

        Args:
            x: tokens, shape [B, L], or what the stage before returned; of `micro`.
        """
        assert self.micro is not None
        rope = self.rotary(self.micro.cuts, self.micro.length, x.device)
        documents = looking(self.micro.cuts, self.micro.length, x.device)
        x_BLD = self.embedding(x) if self.first else x
        for layer in self.layers:
            x_BLD = layer(x_BLD, rope, documents)
        out = self.loss(self.head(self.norm(x_BLD)), self.micro.targets) if self.last else x_BLD
        if self.trace is not None:
            self.trace.forward(self.index, x, out)
        return out


def cut(model: Llama, world: World, job: runfile.Trainer, loss: Loss) -> list[Stage]:
    """Cut a model into stages; return those of this rank."""
    pp, each = world.layout.pp, stages_per_rank(job)
    layers = stages(model.config.layers, pp * each)
    indices = range(world.position.pp, pp * each, pp)
    return [Stage(model, index, layers, loss) for index in indices]


class Pipeline:
    """Takes micro-batches through the stages of this rank.

    Args:
        parts: the stages of this rank, sharded.
        world: whose pipeline it is.
        job: what to train.
        compute: the type of what goes from stage to stage.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        world: World,
        job: runfile.Trainer,
        compute: torch.dtype,
    ) -> None:
        self._stages = [part for part in parts if isinstance(part, Stage)]
        self._world, self._job, self._compute = world, job, compute
        self._schedules: dict[tuple[int, int, int, Purpose], Any] = {}
        """By number of micro-batches, samples of one, their length, and what for."""
        self._losses: list[Tensor] = []
        self._micros: Sequence[Micro] = ()
        self._tokens = 1
        self._announce: Announce = _nobody
        self._each: Callable[[], None] | None = None
        self._trace: Trace | None = None
        self._replays = False

    @property
    def numbers(self) -> list[int]:
        """The numbers of this rank's stages."""
        return [stage.index for stage in self._stages]

    def step(
        self,
        micros: Sequence[Micro],
        tokens: int,
        announce: Announce,
        each: Callable[[], None] | None = None,
        trace: Trace | None = None,
    ) -> list[Tensor]:
        """Leave the gradient of the mean loss in the stages; return the sums of losses.

        Args:
            micros: all of this rank's micro-batches of a step.
            tokens: of the global batch, by which losses are divided.
            announce: hears how it gets on.
            each: called when the gradient of a micro-batch is there, reduced over the ranks of a
                replica; it takes it out of the model. In the order of micro-batches. Without it,
                gradients of all are added up before they are reduced.
            trace: looks at the last micro-batch, if that is wanted.

        Returns:
            One for each micro-batch if this rank has the last stage, else none.
        """
        self._announce, self._tokens, self._each, self._trace = announce, tokens, each, trace
        self._pass(self._schedule(micros, "train").step, micros)
        return self._losses

    def replay(self, micro: Micro, tokens: int, announce: Announce, trace: Trace) -> None:
        """Take a micro-batch through, for the eyes of `trace` only.

        Gradients and whole weights stay where they are, for the caller to drop.

        Args:
            micro: any.
            tokens: as in `step`.
            announce: as there.
            trace: looks at it.
        """
        self._announce, self._tokens, self._each, self._trace = announce, tokens, None, trace
        self._replays = True
        try:
            self._pass(self._schedule([micro], "replay").step, [micro])
        finally:
            self._replays = False

    def look(self, micro: Micro) -> list[Tensor]:
        """Return the sum of losses of one micro-batch, likewise, and learn nothing from it."""
        self._announce, self._each, self._trace = _nobody, None, None
        self._pass(self._schedule([micro], "look").eval, [micro])
        return self._losses

    def _pass(self, run: Callable[..., None], micros: Sequence[Micro]) -> None:
        self._micros, self._losses = micros, []
        first = self._stages[0].first
        inputs = (torch.cat([micro.inputs for micro in micros]),) if first else ()
        # The schedule hands targets out by micro-batch; stages get theirs from `_feed`.
        run(*inputs, target=torch.empty(len(micros)), return_outputs=False)

    def _schedule(self, micros: Sequence[Micro], purpose: Purpose) -> Any:  # noqa: ANN401 - torch's have no common type
        """Return what orders micro-batches like these; it remembers their shapes, and is kept."""
        count, samples, length = len(micros), len(micros[0].inputs), micros[0].length
        key = (count, samples, length, purpose)
        if key not in self._schedules:
            kind: Any = ScheduleInterleaved1F1B
            world, job, all_stages = (
                self._world,
                self._job,
                len(self._stages) * self._world.layout.pp,
            )
            staged: Any = [
                _Staged(stage, all_stages, world, (samples, length), self._compute, self)
                for stage in self._stages
            ]
            if job.pipeline_schedule == "1F1B":
                # The others have fewer micro-batches than stages.
                kind, (staged,) = Schedule1F1B if purpose == "train" else ScheduleGPipe, staged
            self._schedules[key] = kind(staged, count, loss_fn=self._mean, scale_grads=False)
        return self._schedules[key]

    @property
    def each(self) -> Callable[[], None] | None:
        """As in the present `step`."""
        return self._each

    @property
    def reduces(self) -> bool:
        """Whether gradients are reduced once all micro-batches were computed."""
        return self._each is None and not self._replays

    def feed(self, phase: RankPhase, micro: int) -> Micro:
        """Return a micro-batch that is about to be computed in this way."""
        self._announce(phase, micro)
        return self._micros[micro]

    def looking(self, micro: int) -> Trace | None:
        """Return who looks at a micro-batch."""
        return self._trace if micro == len(self._micros) - 1 else None

    def _mean(self, loss: Tensor, _target: Tensor) -> Tensor:
        self._losses.append(loss.detach())
        return loss / self._tokens


def _nobody(_phase: RankPhase, _micro: int) -> None:
    """Hear nothing."""


class _Staged(PipelineStage):
    """A stage that says what it is doing, and is fed what does not come from the one before."""

    def __init__(
        self,
        part: Stage,
        count: int,
        world: World,
        shape: tuple[int, int],
        compute: torch.dtype,
        pipeline: Pipeline,
    ) -> None:
        assert world.mesh is not None
        # What goes from stage to stage, said beforehand: else torch takes a step to find out.
        B, L = shape
        tokens = torch.empty(B, L // world.layout.cp, dtype=torch.int64, device="meta")
        sizes = (B, L // (world.layout.cp * world.layout.tp), part.config.dim)
        between = torch.empty(sizes, dtype=compute, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        super().__init__(
            part,
            part.index,
            count,
            world.device,
            input_args=tokens if part.first else between,
            output_args=loss if part.last else between,
            group=world.mesh["pp"].get_group(),
        )
        self._part, self._pipeline = part, pipeline

    def forward_one_chunk(self, fwd_chunk_id: int, *rest: object, **more: object) -> object:
        """Compute a micro-batch forward."""
        self._part.micro = self._pipeline.feed(RankPhase.FORWARD, fwd_chunk_id)
        self._part.trace = trace = self._pipeline.looking(fwd_chunk_id)
        with trace.following(self._part.index, self._part) if trace else contextlib.nullcontext():
            return super().forward_one_chunk(fwd_chunk_id, *rest, **more)  # type: ignore[arg-type]

    def backward_one_chunk(self, bwd_chunk_id: int, *rest: object, **more: object) -> None:
        """Compute a micro-batch backward."""
        self._pipeline.feed(RankPhase.BACKWARD, bwd_chunk_id)
        trace = self._pipeline.looking(bwd_chunk_id)
        if trace is not None:
            trace.before_backward(self._part.index, self._part)
        super().backward_one_chunk(bwd_chunk_id, *rest, **more)  # type: ignore[arg-type]
        if trace is not None:
            trace.after_backward(self._part.index)
        if self._pipeline.each is not None:
            super().perform_reduce_grad(1)
            self._pipeline.each()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce what all micro-batches came to, unless that was done with each of them."""
        if self._pipeline.reduces:
            super().perform_reduce_grad(grad_scale_factor)
