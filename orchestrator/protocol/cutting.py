"""Which layouts a model and a batch can be cut into, and the nearest one that they can.

Asked without torch before a run begins, and by every rank again: a checkpoint folder may be read
with another run file than it was written with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from orchestrator.protocol.layout import Layout
from orchestrator.protocol.runfile import Trainer, TrainingRun
from orchestrator.protocol.sizes import ModelConfig


class Obstacle(NamedTuple):
    """Why something can not be cut, and what to change."""

    message: str
    hint: str = ""
    """Empty: see the nearest layout that can be cut."""


class Cut(NamedTuple):
    """How the state of a replica is cut: worlds that have the same have the same shards."""

    pp: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    stages_per_rank: int = 1

    def __str__(self) -> str:
        names = ("pp", "dpShard", "cp", "tp", "stagesPerRank")
        sizes = [f"{name} {n}" for name, n in zip(names, self, strict=True) if n > 1]
        return f"{in_shards(self.shards)}" + f" ({' x '.join(sizes)})" * bool(sizes)

    @property
    def shards(self) -> int:
        """How many shards that are."""
        return self.pp * self.dp_shard * self.cp * self.tp


def cut_of(run: TrainingRun) -> Cut:
    """Return how a run cuts its state."""
    layout = run.layout
    stages = stages_per_rank(run.spec.trainer) if layout.pp > 1 else 1
    return Cut(layout.pp, layout.dp_shard, layout.cp, layout.tp, stages)


def in_shards(count: int) -> str:
    """Return a number of shards in words."""
    return f"{count} shard{'s' * (count != 1)}"


def obstacles(model: ModelConfig, job: Trainer, layout: Layout) -> Iterator[Obstacle]:
    """Yield why a run can not be cut as it is written, the most basic first.

    Shares of the global batch are taken to be equal, or are looked at elsewhere.
    """
    found = [*_lengths(model, job), *_sizes(model, job, layout)]
    if layout.pp > 1 and stages_per_rank(job) > 1 and job.reduction == "deterministic":
        found.append(
            Obstacle(
                "spec.trainer.pipelineSchedule is interleaved and spec.trainer.reduction is "
                "deterministic, expected 1F1B",
                "it takes micro-batches in rounds of the pipeline, which do not come out even with "
                "every number of replicas",
            )
        )
    found += idle_pipeline(job, layout)
    for obstacle in found:
        yield obstacle._replace(hint=obstacle.hint or _nearest_words(model, job, layout))


def nearest(model: ModelConfig, job: Trainer, layout: Layout) -> Layout | None:
    """Return the layout of as many ranks that can be cut and is nearest to one that can not.

    Nearest: the fewest doublings and halvings of the five sizes; of equally near ones, that with
    the least of pp, cp and tp, which cost more than data parallelism.
    """
    world, best = layout.world_size, None
    # Only what a size can be cut into is tried: of a huge world nobody could try all divisors.
    together = _divisors(math.gcd(world, model.kv_heads, job.seq_len, *_later(job)))
    batches = _divisors(math.gcd(world, job.global_batch))
    stage_counts = [pp for pp in range(1, min(model.layers, world) + 1) if world % pp == 0]
    for pp, cp, tp in itertools.product(stage_counts, together, together):
        rest, over = divmod(world, pp * cp * tp)
        if over or job.global_batch % rest:
            continue
        for replicate in (size for size in batches if rest % size == 0):
            other = Layout(replicate, pp, rest // replicate, cp, tp)
            far = sum(abs(math.log(a / b)) for a, b in zip(other, layout, strict=True))
            rank = (round(far, 6), pp * cp * tp, other)
            if (best is None or rank < best) and not _uncuttable(model, job, other):
                best = rank
    return best[2] if best else None


def stages_per_rank(job: Trainer) -> int:
    """Return how many stages of a pipeline each of its ranks has."""
    return 1 if job.pipeline_schedule == "1F1B" else job.stages_per_rank


def stages(layers: int, count: int) -> list[range]:
    """Return which layers each of `count` pipeline stages has, in order.

    The first stage also has the embedding and the last one the head, each about as much work as a
    layer: where it comes out, they have one layer fewer.

    Raises:
        ValueError: if there are fewer layers than stages.

    Source: arXiv 2407.21783, section 3.3.2.

    >>> [len(stage) for stage in stages(126, 16)][:3]
    [7, 8, 8]
    >>> [len(stage) for stage in stages(5, 4)]
    [1, 2, 1, 1]
    """
    if layers < count:
        raise ValueError(f"{layers} layers are fewer than {count} stages")
    sizes = _even(layers + 2, count)
    sizes[0] -= 1
    sizes[-1] -= 1
    if min(sizes) < 1:
        sizes = _even(layers, count)
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _even(amount: int, count: int) -> list[int]:
    """Cut an amount into equal parts; what is left over goes to the parts after the first."""
    each, rest = divmod(amount, count)
    return [each + ((i - 1) % count < rest) for i in range(count)]


def _lengths(model: ModelConfig, job: Trainer) -> Iterator[Obstacle]:
    """Yield which sequences are longer than the model may have them."""
    later = (("spec.trainer.lengthRamp: seqLen", length) for length in _later(job))
    for name, length in (("spec.trainer.seqLen", job.seq_len), *later):
        if length > model.max_length:
            yield Obstacle(
                f"{name} is {length}, expected at most the model's maxLength = {model.max_length}",
                "make it shorter; of a model with sizes of its own, maxLength may be raised",
            )


def _sizes(model: ModelConfig, job: Trainer, layout: Layout) -> Iterator[Obstacle]:
    """Yield which sizes of a model can not be cut."""
    cp, tp = layout.cp, layout.tp
    for name, size, parts, by in (
        ("spec.trainer.model: kvHeads", model.kv_heads, tp, "tp"),
        ("spec.trainer.model: ffnDim", model.ffn_dim, tp, "tp"),
        ("spec.trainer.model: vocab", model.vocab, tp, "tp"),
        ("spec.trainer.model: kvHeads", model.kv_heads, tp * cp, "tp x cp"),
        ("spec.trainer.seqLen", job.seq_len, tp * cp, "tp x cp"),
        *(("spec.trainer.lengthRamp: seqLen", L, tp * cp, "tp x cp") for L in _later(job)),
    ):
        if size % parts:
            yield Obstacle(f"{name} is {size}, expected a multiple of {by} = {parts}")
            return
    count = layout.pp * stages_per_rank(job)
    if layout.pp > 1 and model.layers < count:
        each = f" x stagesPerRank {job.stages_per_rank}" if count > layout.pp else ""
        yield Obstacle(
            f"spec.trainer.model: layers is {model.layers}, expected at least one for each of "
            f"the {count} stages of pp {layout.pp}{each}"
        )


def _later(job: Trainer) -> list[int]:
    """Return the lengths that sequences have later in a run."""
    return [change.seq_len for change in job.length_ramp]


def idle_pipeline(job: Trainer, layout: Layout) -> Iterator[Obstacle]:
    """Yield why micro-batches can not keep a pipeline busy, if shares are equal."""
    pp, (share, rest) = layout.pp, divmod(job.global_batch, layout.readers)
    fixed = job.reduction == "deterministic"
    size = job.micro_batch or (1 if fixed else share)
    # Shares may be uneven in a fixed order: the least one counts.
    micro_batches = job.global_batch // (size * layout.dp_shard) // layout.dp_replicate
    if (rest and not fixed) or micro_batches == 0:
        return  # said elsewhere
    what = (
        f"spec.trainer.microBatch is {size}, which makes {micro_batches} of a share of {share} "
        "samples"
    )
    if pp > 1 and micro_batches < pp:
        yield Obstacle(
            f"{what}; expected at least pp = {pp}",
            f"set spec.trainer.microBatch to {share // pp} or less, a divisor of {share}"
            if share >= pp
            else "",
        )
    elif pp > 1 and stages_per_rank(job) > 1 and micro_batches % (micro_batches // pp):
        yield Obstacle(
            f"{what}; expected a multiple of the {micro_batches // pp} rounds of the pipeline",
            f"a multiple of pp = {pp} micro-batches always is",
        )


def _uncuttable(model: ModelConfig, job: Trainer, layout: Layout) -> bool:
    """Whether there is no size of micro-batches with which a run could be cut in this way."""
    share, rest = divmod(job.global_batch, layout.readers)
    return bool(rest) or share < layout.pp or any(_sizes(model, job, layout))


def _nearest_words(model: ModelConfig, job: Trainer, layout: Layout) -> str:
    found = nearest(model, job, layout)
    if found is None or found == layout:
        return "change the model's sizes, the batch, or the number of ranks"
    return f"the nearest layout that can be cut: {found}"


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
