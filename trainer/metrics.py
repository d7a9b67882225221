"""One line of JSON per step, written by rank 0 beside its log: `steps.jsonl`; and loss spikes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from orchestrator.protocol import runfile
from orchestrator.protocol.rank import Seat
from orchestrator.protocol.steps import STEPS_FILE, StepLine
from trainer.flops import peak_tflops
from trainer.spikes import Spikes


class Figures(NamedTuple):
    """What a step came to."""

    step: int
    loss: float
    """Of the global batch, mean per token."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens: int
    """Of the global batch."""
    seconds: float
    flops: float
    """Of this rank (trainer.flops)."""


@contextlib.contextmanager
def open_log(
    seat: Seat, job: runfile.Trainer, device: torch.device
) -> Iterator[Callable[[Figures], None]]:
    """Return what writes a step's line, on rank 0; on other ranks, what writes nothing.

    A step that was taken again, by a later generation, has a line for each time.
    """
    if seat.rank != 0 or not seat.log:
        yield lambda _: None
        return
    known = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    peak = job.peak_tflops or known
    # In one piece and without a buffer: a rank that is killed leaves whole lines.
    with Path(seat.log).with_name(STEPS_FILE).open("ab", buffering=0) as file:
        spikes = Spikes()
        yield lambda figures: _note(file, _line(figures, seat.generation, peak), spikes)


def _note(file: FileIO, line: StepLine, spikes: Spikes) -> None:
    file.write(msgspec.json.encode(line) + b"\n")
    if (words := spikes.observe(line.step, line.loss, line.grad_norm)) is not None:
        print(words, file=sys.stderr)  # noqa: T201 - the rank's log


def _line(figures: Figures, generation: int, peak_tflops: float | None) -> StepLine:
    tflops = figures.flops / figures.seconds / 1e12
    return StepLine(
        generation=generation,
        step=figures.step,
        loss=figures.loss,
        grad_norm=figures.grad_norm,
        learning_rate=figures.learning_rate,
        tokens=figures.tokens,
        seconds=figures.seconds,
        tokens_per_s=figures.tokens / figures.seconds,
        tflops_per_gpu=tflops,
        mfu=tflops / peak_tflops if peak_tflops else None,
    )
