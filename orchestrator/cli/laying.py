"""What `holdfast plan layout` answers: what a rank of a layout holds, and which GPU it fits."""

from __future__ import annotations

from typing import Any

import msgspec

from orchestrator.cli import units
from orchestrator.cli.answers import Answer
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.tables import Column, Row, text
from orchestrator.protocol.cutting import obstacles
from orchestrator.protocol.fitting import EMBEDDED
from orchestrator.protocol.footprint import Footprint, assumptions, footprint, micro_batches
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.sizes import PRESETS, ModelConfig

GPUS = {"80GB": 80_000_000_000, "141GB": 141_000_000_000}
"""Memory of an H100 and of an H200 in bytes, as they are sold; they have some more."""
RESERVE = 5_000_000_000
"""Bytes left to the driver, communicators, work space and fragments. Assumed."""
SIZES = ("8B", "70B", "405B")
RUN = "run"
"""Name of the row with the run's own model."""
_COMPUTE = {"auto": 2, "bf16": 2, "fp32": 4}
"""Bytes of a number that layers compute with; `auto` as on a GPU."""


def layout(run: TrainingRun) -> Answer:
    """Return what a rank holds, of the run's model and of the published ones in its place.

    Raises:
        CliError: if the run is not the embedded trainer's.
    """
    trainer = run.spec.trainer
    if trainer.entrypoint != EMBEDDED:
        raise CliError(
            f"spec.trainer.entrypoint is {trainer.entrypoint}, expected {EMBEDDED}",
            "only of the embedded trainer is it known what it holds",
            Exit.USAGE,
        )
    compute = _COMPUTE[trainer.precision]
    own = trainer.model
    models = {RUN: PRESETS[own] if isinstance(own, str) else msgspec.convert(own, ModelConfig)}
    models |= {size: PRESETS[size] for size in SIZES if PRESETS[size] != models[RUN]}
    left = f"of which {units.size(RESERVE)} are left to all else"
    micro, _ = micro_batches(trainer, run.layout)
    return Answer(
        question="layout",
        headline=(
            f"{run.metadata.name}: {run.world_size} ranks, {run.layout}; micro-batches of "
            f"{units.count(micro, 'sequence')} of "
            f"{units.count(trainer.seq_len, 'token')}, "
            f"activation checkpointing {trainer.activation_checkpointing}"
        ),
        given={
            "ranks": run.world_size,
            "seq_len": trainer.seq_len,
            "micro_batch": micro,
            "reserve_bytes": RESERVE,
        },
        columns=_COLUMNS,
        rows=[_row(run, name, model, compute) for name, model in models.items()],
        assumptions=(
            *assumptions(compute),
            *(f"{gpu}: {size} bytes, {left} (assumed)" for gpu, size in GPUS.items()),
            "checkpoint: what a rank hands over at each save, into the memory of its node",
        ),
    )


def _row(run: TrainingRun, name: str, model: ModelConfig, compute: int) -> Row:
    trainer = run.spec.trainer
    for obstacle in obstacles(model, trainer, run.layout):
        nothing = dict.fromkeys([*Footprint._fields, "total", *GPUS])
        return {"name": name, **nothing, "note": obstacle.message}
    found = footprint(model, trainer, run.layout, compute=compute)
    fits: dict[str, Any] = {gpu: found.total + RESERVE <= size for gpu, size in GPUS.items()}
    return {"name": name, **found._asdict(), "total": found.total, **fits, "note": ""}


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e9:.2f}" if value >= 1e9 or not value else f"{value / 1e9:.2g}"


def _number(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e9:.3f}" if value >= 1e9 else f"{value / 1e9:.2g}"


def _fits(value: bool | None) -> str:
    return "-" if value is None else ("fits" if value else "no")


_COLUMNS = (
    Column("MODEL", "name"),
    Column("WEIGHTS (1e9)", "parameters", _number),
    Column("WEIGHTS (GB)", "weights", _bytes),
    Column("GRADIENTS (GB)", "gradients", _bytes),
    Column("OPTIMIZER (GB)", "optimizer", _bytes),
    Column("GATHERED (GB)", "gathered", _bytes, wide=True),
    Column("ACCUMULATED (GB)", "accumulated", _bytes, wide=True),
    Column("ACTIVATIONS (GB)", "activations", _bytes),
    Column("RECOMPUTED (GB)", "recomputed", _bytes, wide=True),
    Column("LOGITS (GB)", "logits", _bytes, wide=True),
    Column("TOTAL (GB)", "total", _bytes),
    *(Column(gpu, gpu, _fits) for gpu in GPUS),
    Column("CHECKPOINT (GB)", "checkpoint", _bytes),
    Column("WHY NOT", "note", text),
)
