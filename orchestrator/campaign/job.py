"""The small run that a campaign strikes, if it is given none."""

from __future__ import annotations

from typing import Any

import msgspec

from orchestrator.protocol.runfile import TrainingRun

MODEL = {"dim": 32, "layers": 2, "heads": 4, "kvHeads": 2, "ffnDim": 64, "vocab": 1280}
RANKS = 3
"""The fewest of which a majority says something."""
REPLAYS = 1 / 16
"""Share of the time: of two micro-batches, one is computed once more every eighth step."""
STEPS = 40_000
"""More than are ever taken: the learning rate is still going down at the last."""


def small(steps: int = STEPS) -> TrainingRun:
    """Return a run of three replicas with a tiny Llama, all digests and norms at every step."""
    trainer = {"model": MODEL, "seqLen": 32, "warmupSteps": 40, "steps": steps}
    shares = {"digestShare": 1.0, "normShare": 1.0, "replayShare": REPLAYS}
    return _run(trainer, {"detectWithin": "3s", **shares})


def timed(steps: int) -> TrainingRun:
    """Return a run whose steps take as long as some looks at them, for slow ranks to be seen."""
    trainer = {"model": "debug", "seqLen": 128, "steps": steps}
    return _run(trainer, {"detectWithin": "3s"})


def resizing(steps: int, reduction: str) -> TrainingRun:
    """Return a run that goes on with a replica less while it lacks a node, and grows back.

    It looks for everything in every step, and takes longer for one than `small` does: it is to be
    long enough for a node to come back, and for that to pay.
    """
    trainer = {"model": "debug", "seqLen": 128, "steps": steps, "reduction": reduction}
    shares = {"digestShare": 1.0, "normShare": 1.0, "replayShare": REPLAYS}
    run = _run(trainer, {"detectWithin": "3s", **shares})
    nodes = msgspec.structs.replace(run.spec.nodes, spares=0)
    recovery = msgspec.structs.replace(run.spec.recovery, min_replicas=RANKS - 1)
    spec = msgspec.structs.replace(run.spec, nodes=nodes, recovery=recovery)
    return msgspec.structs.replace(run, spec=spec)


def usual() -> TrainingRun:
    """Return a run whose steps take long enough to be a measure, with detectors as by default."""
    return _run({"model": "debug", "seqLen": 128, "steps": STEPS}, {})


def reseeded(run: TrainingRun, trainer_seed: int) -> TrainingRun:
    """Return a run that takes other steps: its weights and the order of its samples are drawn."""
    trainer = msgspec.structs.replace(run.spec.trainer, seed=trainer_seed)
    spec = msgspec.structs.replace(run.spec, trainer=trainer)
    return msgspec.structs.replace(run, spec=spec)


def _run(trainer: dict[str, Any], detection: dict[str, Any]) -> TrainingRun:
    fields: dict[str, Any] = {
        "apiVersion": "holdfast.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "campaign"},
        "spec": {
            "campaign": True,
            "nodes": {"count": RANKS, "ranksPerNode": 1, "spares": 1},
            "parallelism": {"dpReplicate": RANKS, "dpShard": 1},
            "trainer": {
                "globalBatch": 2 * RANKS,
                "microBatch": 1,
                "device": "cpu",
                **trainer,
            },
            "checkpoint": {"everySteps": 50, "memoryEverySteps": 5},
            "detection": detection,
        },
    }
    return msgspec.convert(fields, TrainingRun)
