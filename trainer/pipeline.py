"""Pipeline parallelism: a model cut by layers into stages, and micro-batches that go through them.

Stage s is on rank s mod pp of its pipeline: with `1F1B` each rank has one, with `interleaved`
several, which makes the pipeline fill and drain faster for more messages. Ranks of a pipeline work
on the same samples: the first stage reads the tokens, the last one the targets, and every stage the
borders of documents. Names of weights are those of the whole model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from orchestrator.protocol import runfile
from orchestrator.protocol.cutting import stages, stages_per_rank
from orchestrator.worker import RankPhase
from trainer.documents import Cuts, looking
from trainer.model import Llama
from trainer.parallel import World

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


# It prints the whole schedule when an operation fails, and that a peer is gone is told elsewhere.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
Loss = Callable[[Tensor, Tensor], Tensor]
Feed = Callable[[RankPhase, int], Micro]


class Stage(nn.Module):
    """Some layers of a model, with the embedding if they are the first, and the head if the last.

    Attributes:
        micro: what is computed next.

    Args:
        model: gives up what the stage is made of.
        index: which stage.
        layers: of each stage.
        length: of sequences.
        loss: as `next_token_loss`.
    """

    def __init__(
        self, model: Llama, index: int, layers: list[range], length: int, loss: Loss
    ) -> None:
        super().__init__()
        self.config, self.length, self.index = model.config, length, index
        self.rotary, self.loss = model.rotary, loss
        self.micro: Micro | None = None
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
        rope = self.rotary(self.micro.cuts, self.length, x.device)
        documents = looking(self.micro.cuts, self.length, x.device)
        x_BLD = self.embedding(x) if self.first else x
        for layer in self.layers:
            x_BLD = layer(x_BLD, rope, documents)
        return self.loss(self.head(self.norm(x_BLD)), self.micro.targets) if self.last else x_BLD


def cut(model: Llama, world: World, job: runfile.Trainer, loss: Loss) -> list[Stage]:
    """Cut a model into stages; return those of this rank."""
    pp, each = world.layout.pp, stages_per_rank(job)
    layers = stages(model.config.layers, pp * each)
    indices = range(world.position.pp, pp * each, pp)
    return [Stage(model, index, layers, job.seq_len, loss) for index in indices]


class Pipeline:
    """Takes steps through the stages of this rank.

    Args:
        parts: the stages of this rank, sharded.
        world: whose pipeline it is.
        job: what to train.
        micro_batches: how many a step has.
        tokens: of a global batch, by which losses are divided.
        compute: the type of what goes from stage to stage.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        world: World,
        job: runfile.Trainer,
        micro_batches: int,
        tokens: int,
        compute: torch.dtype,
    ) -> None:
        stages_here = [part for part in parts if isinstance(part, Stage)]
        self._count, self._tokens = micro_batches, tokens
        self._losses: list[Tensor] = []
        self._micros: Sequence[Micro] = ()
        self._announce: Announce = _nobody
        count = world.layout.pp * len(stages_here)
        self._first = stages_here[0].first
        staged = [_Staged(part, count, world, job, compute, self._feed) for part in stages_here]
        kind: Any = Schedule1F1B if job.pipeline_schedule == "1F1B" else ScheduleInterleaved1F1B
        self._schedule = kind(
            staged[0] if kind is Schedule1F1B else staged,
            micro_batches,
            loss_fn=self._mean,
            scale_grads=False,
        )

    def step(self, micros: Sequence[Micro], announce: Announce) -> list[Tensor]:
        """Leave the gradient of the mean loss in the stages; return the sums of losses.

        Returns:
            One for each micro-batch if this rank has the last stage, else none.
        """
        self._micros, self._announce, self._losses = micros, announce, []
        inputs = (torch.cat([micro.inputs for micro in micros]),) if self._first else ()
        # The schedule hands targets out by micro-batch; stages get theirs from `_feed`.
        self._schedule.step(*inputs, target=torch.empty(self._count), return_outputs=False)
        return self._losses

    def _feed(self, phase: RankPhase, micro: int) -> Micro:
        self._announce(phase, micro)
        return self._micros[micro]

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
        job: runfile.Trainer,
        compute: torch.dtype,
        feed: Feed,
    ) -> None:
        samples = job.micro_batch
        assert samples is not None, "read_job writes it out"
        assert world.mesh is not None
        # What goes from stage to stage, said beforehand: else torch takes a step to find out.
        tokens = torch.empty(samples, job.seq_len, dtype=torch.int64, device="meta")
        length = job.seq_len // (world.layout.tp * world.layout.cp)
        shape = (samples, length, part.config.dim)
        between = torch.empty(shape, dtype=compute, device="meta", requires_grad=True)
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
        self._part, self._feed = part, feed

    def forward_one_chunk(self, fwd_chunk_id: int, *rest: object, **more: object) -> object:
        """Compute a micro-batch forward."""
        self._part.micro = self._feed(RankPhase.FORWARD, fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *rest, **more)  # type: ignore[arg-type]

    def backward_one_chunk(self, bwd_chunk_id: int, *rest: object, **more: object) -> None:
        """Compute a micro-batch backward."""
        self._feed(RankPhase.BACKWARD, bwd_chunk_id)
        super().backward_one_chunk(bwd_chunk_id, *rest, **more)  # type: ignore[arg-type]
