"""What the embedded trainer writes of steps and evaluations, beside the log of rank 0."""

from __future__ import annotations

import msgspec

STEPS_FILE = "steps.jsonl"
"""In the folder of the ranks' logs; a line of JSON for each step, each time it is taken."""

EVALUATIONS_FILE = "evaluations.jsonl"
"""Beside it; a line of JSON for each evaluation, each time it is done."""


class EvaluationLine(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What the loss on documents is that are never trained on."""

    generation: int
    step: int
    """After which it was computed."""
    loss: float
    """Mean per token."""
    samples: int
    sources: dict[str, float]
    """The loss of each source, if there are several that have held something back."""


class StepLine(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A line of the file."""

    generation: int
    step: int
    loss: float
    """Of the global batch, mean per token."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens: int
    """Of the global batch."""
    seconds: float
    tokens_per_s: float
    """Of the whole world."""
    tflops_per_gpu: float
    """Of rank 0: 1e12 operations of training per second; on a CPU, of its share of the cores."""
    mfu: float | None
    """Of what the device could do with dense bf16 matrices; None where that is not known."""
