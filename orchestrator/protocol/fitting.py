"""What must fit together in a run file, as far as the file by itself can tell.

What only a node can tell (whether the data is there, the entrypoint can be imported, the tokenizer
has as many tokens as the model) is found out by the ranks, and ends the run as `misconfigured`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from orchestrator.protocol import sizes
from orchestrator.protocol.cutting import idle_pipeline, obstacles
from orchestrator.protocol.devices import SERIAL_MAX, is_serial
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.ramp import Ramp, at_stage
from orchestrator.protocol.runfile import Data, Trainer, TrainingRun, seconds

EMBEDDED = Trainer().entrypoint
"""The trainer that comes with holdfast; what others make of the fields is their own affair."""
_FIELDS = msgspec.structs.fields(sizes.ModelConfig)
SIZES = tuple(field.encode_name for field in _FIELDS if field.required)
"""Of a model that is written out, all of them; what else there is has a default."""
MORE_SIZES = tuple(field.encode_name for field in _FIELDS if not field.required)


class Misfit(NamedTuple):
    """Parts of a run that do not fit together, and what to change."""

    message: str
    hint: str


def misfits(run: TrainingRun) -> Iterator[Misfit]:
    """Yield what does not fit, the most basic first."""
    yield from _world(run)
    yield from _serials(run)
    yield from _pauses(run)
    yield from _replicas(run)
    yield from _intervals(run)
    if run.spec.trainer.entrypoint == EMBEDDED:
        yield from _sizes(run.spec.trainer.model)
        yield from _embedded(run)


def warm_up_words(run: TrainingRun) -> str:
    """Say that a warm-up limit is too short to be taken as it is written; "" if it is not."""
    detection = run.spec.detection
    least_s = 2 * seconds(detection.detect_within)
    if seconds(detection.warmup_limit) >= least_s:
        return ""
    return (
        f"detection.warmupLimit is {detection.warmup_limit}, taken as {least_s:g} s: "
        f"at least twice detectWithin"
    )


def _world(run: TrainingRun) -> Iterator[Misfit]:
    nodes, layout = run.spec.nodes, run.layout
    if layout.world_size != run.world_size:
        yield Misfit(
            f"spec.parallelism multiplies to {layout.world_size}, expected {run.world_size} "
            f"(nodes.count {nodes.count} x nodes.ranksPerNode {nodes.ranks_per_node})",
            "leave out dpShard to have it fill what the other dimensions leave",
        )


def _serials(run: TrainingRun) -> Iterator[Misfit]:
    whose: dict[str, str] = {}
    for node, serial in sorted(run.spec.nodes.serials.items()):
        where = f"spec.nodes.serials.{node} is {serial!r}"
        if not is_serial(serial):
            yield Misfit(
                f"{where}, expected 1 to {SERIAL_MAX} characters that can be printed, no space",
                "write for example `rack7-u12`",
            )
        elif serial in whose:
            yield Misfit(
                f"{where}, and {whose[serial]} has the same",
                "each machine has one of its own: a verdict about one would take out both",
            )
        whose[serial] = node


def _pauses(run: TrainingRun) -> Iterator[Misfit]:
    recovery = run.spec.recovery
    if seconds(recovery.backoff) > seconds(recovery.backoff_max):
        yield Misfit(
            f"spec.recovery.backoff is {recovery.backoff}, "
            f"expected at most backoffMax = {recovery.backoff_max}",
            "the first pause is the shortest: raise backoffMax, or lower backoff",
        )


def _intervals(run: TrainingRun) -> Iterator[Misfit]:
    every = run.spec.checkpoint
    for name, least, most in (
        ("everyMin", every.every_min, every.every_max),
        ("memoryEveryMin", every.memory_every_min, every.memory_every_max),
    ):
        if seconds(least) > seconds(most):
            yield Misfit(
                f"spec.checkpoint.{name} is {least}, expected at most "
                f"{name.replace('Min', 'Max')} = {most}",
                "an interval lies between the two: raise the one, or lower the other",
            )


def _replicas(run: TrainingRun) -> Iterator[Misfit]:
    least, full = run.spec.recovery.min_replicas, run.spec.parallelism.dp_replicate
    if least is not None and least > full:
        yield Misfit(
            f"spec.recovery.minReplicas is {least}, expected at most "
            f"spec.parallelism.dpReplicate = {full}",
            "leave it out for a run that goes on with all of them or not at all",
        )


def _sizes(model: str | dict[str, Any]) -> Iterator[Misfit]:
    where = "spec.trainer.model"
    if isinstance(model, str):
        if model not in sizes.PRESETS:
            yield Misfit(
                f"{where} is {model!r}, expected one of {', '.join(sizes.PRESETS)}",
                "or write the sizes themselves: {dim: 128, layers: 4, ...}",
            )
        return
    hint = f"sizes are {', '.join(SIZES)}; more, with a default: {', '.join(MORE_SIZES)}"
    if missing := [name for name in SIZES if name not in model]:
        yield Misfit(f"{where} lacks {', '.join(missing)}", hint)
    if unknown := sorted(model.keys() - {*SIZES, *MORE_SIZES}):
        yield Misfit(f"{where} has unknown field {unknown[0]!r}", hint)
    if missing or unknown:
        return
    try:
        config = msgspec.convert(model, sizes.ModelConfig)
    except msgspec.ValidationError as error:
        yield Misfit(f"{where}: {error}", hint)
        return
    for message, what_to_do in sizes.misfits(config):
        yield Misfit(f"{where}: {message}", what_to_do)


def _config(model: str | dict[str, Any]) -> sizes.ModelConfig | None:
    """Return the sizes of a model; None if they are not written as they should be."""
    if isinstance(model, str):
        return sizes.PRESETS.get(model)
    try:
        config = msgspec.convert(model, sizes.ModelConfig)
    except msgspec.ValidationError:
        return None
    return None if any(sizes.misfits(config)) else config


def _embedded(run: TrainingRun) -> Iterator[Misfit]:
    """Yield what the embedded trainer would refuse for other reasons than its model."""
    trainer = run.spec.trainer
    layout = run.layout
    if layout.world_size == run.world_size:  # or `_world` has said so
        yield from batch_misfits(trainer, layout.dp_replicate, layout.dp_shard)
        config = _config(trainer.model)
        for obstacle in obstacles(config, trainer, layout) if config is not None else ():
            yield Misfit(*obstacle)
        yield from ramp_misfits(trainer, layout)
    yield from _beginning(trainer)
    yield from _data(trainer)


def batch_misfits(trainer: Trainer, replicas: int, shards: int) -> Iterator[Misfit]:
    """Yield why a global batch can not be shared out to the whole world of a run."""
    if trainer.reduction == "deterministic":
        yield from _round_misfits(trainer, replicas, shards)
        return
    ranks = replicas * shards
    share, rest = divmod(trainer.global_batch, ranks)
    if rest:
        yield Misfit(
            f"spec.trainer.globalBatch is {trainer.global_batch}, "
            f"expected a multiple of the {ranks} ranks",
            "every rank takes the same number of samples",
        )
    elif share % (trainer.micro_batch or share):
        yield Misfit(
            f"spec.trainer.microBatch is {trainer.micro_batch}, "
            f"expected a divisor of each rank's {share} samples",
            "globalBatch / ranks must be a multiple of microBatch",
        )


def ramp_misfits(trainer: Trainer, layout: Layout) -> Iterator[Misfit]:
    """Yield why batches or sequences can not change as the ramps say."""
    for name, ramp in (("batchRamp", trainer.batch_ramp), ("lengthRamp", trainer.length_ramp)):
        tokens = [change.tokens for change in ramp]
        if tokens != sorted(set(tokens)):
            yield Misfit(
                f"spec.trainer.{name} has tokens {', '.join(map(str, tokens))}, "
                "expected rising numbers",
                "write the changes in the order in which they happen",
            )
    if trainer.reduction == "fast":
        micro = trainer.micro_batch or max(trainer.global_batch // layout.readers, 1)
        trainer = msgspec.structs.replace(trainer, micro_batch=micro)
    for before, stage in itertools.pairwise(Ramp.of(trainer).stages):
        then = at_stage(trainer, stage)
        longer = (stage.length, stage.micro) != (before.length, before.micro)
        where = f"spec.trainer.{'lengthRamp' if longer else 'batchRamp'}"
        for message, hint in (
            *batch_misfits(then, layout.dp_replicate, layout.dp_shard),
            *idle_pipeline(then, layout),
        ):
            yield Misfit(f"{where}: {message.removeprefix('spec.trainer.')}", hint)


def _round_misfits(trainer: Trainer, replicas: int, shards: int) -> Iterator[Misfit]:
    size = trainer.micro_batch or 1
    rounds, rest = divmod(trainer.global_batch, shards * size)
    what = f"spec.trainer.globalBatch is {trainer.global_batch}"
    why = (
        "deterministic reduction adds up rounds of one micro-batch for each of dpShard ranks; "
        "change globalBatch, or set microBatch (default 1)"
    )
    if rest:
        yield Misfit(
            f"{what}, expected a multiple of dpShard x microBatch = {shards} x {size}", why
        )
    elif rounds < replicas:
        yield Misfit(
            f"{what}, which is {rounds} rounds of dpShard x microBatch = {shards} x {size}, "
            f"expected one for each of the {replicas} replicas at least",
            why,
        )


def _beginning(trainer: Trainer) -> Iterator[Misfit]:
    if trainer.init_from is not None and trainer.continue_from is not None:
        yield Misfit(
            f"spec.trainer.initFrom is {trainer.init_from} and continueFrom is "
            f"{trainer.continue_from}, expected one of them",
            "continueFrom takes the weights along with the rest",
        )


def _data(trainer: Trainer) -> Iterator[Misfit]:
    where, data = "spec.trainer.data", trainer.data
    named: tuple[str, ...] | None
    match data:
        case Data():
            named = tuple(source.uri for source in data.sources)
        case str():
            named = (data,)
        case _:
            named = data
    if named is not None and (not named or not all(map(str.strip, named))):
        yield Misfit(
            f"{where} names nothing",
            "name files, folders or globs, or leave it out for the demo's text",
        )
    if isinstance(data, Data):
        try:
            seconds(data.wait_max)
        except ValueError as error:
            yield Misfit(f"{where}.waitMax: {error}", "write for example `10m`")
    held = data.validation if isinstance(data, Data) else 0.0
    if trainer.eval_every_steps is not None and held == 0:
        yield Misfit(
            f"spec.trainer.evalEverySteps is {trainer.eval_every_steps}, and no document is held "
            f"back: {where}.validation is 0",
            "write `data: {sources: [...], validation: 0.005}`",
        )
